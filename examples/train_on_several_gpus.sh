#!/usr/bin/env bash
# Train on several GPUs of one machine. Lightning starts one process a GPU and averages their gradients (DDP).
#
#   bash examples/train_on_several_gpus.sh 4                                  # on four GPUs
#   bash examples/train_on_several_gpus.sh 4 --trainer.max_steps 5000          # any value can be overridden
#   bash examples/train_on_several_gpus.sh 2 --trainer.accelerator cpu        # two processes on a CPU, to try it out
#
# data.batch_size is that of one process: with N of them a step sees N times as many images.
# More machines: the same command with --trainer.num_nodes, started on each of them as your cluster does it.
# Afterwards, without Lightning: python -c 'import cflow; vae = cflow.load("runs/digits/version_0"); print(vae)'
set -euo pipefail

devices=${1:?usage: bash examples/train_on_several_gpus.sh DEVICES [options of cflow fit]}
shift
exec cflow fit --config digits --trainer.accelerator gpu --trainer.strategy ddp --trainer.devices "$devices" "$@"

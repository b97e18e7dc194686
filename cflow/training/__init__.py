"""Training: a LightningModule, a DataModule, the command ``cflow`` and its presets (extra ``train``)."""

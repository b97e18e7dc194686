"use strict";
// What moves on the page. All of it is drawn from the data in the page; nothing is fetched.
(() => {
  const { runs, shades } = JSON.parse(document.getElementById("data").textContent);
  const one = (query, root = document) => root.querySelector(query);
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const words = (name) => name.replaceAll("_", " ");
  const format = (value, digits = 4) => value.toLocaleString("en", { maximumSignificantDigits: digits }).replace("-", "−");
  const colour = (i) => `var(--c${i % 7})`;
  const redraws = []; // what has to be drawn anew under other colours or in another width

  function make(parent, name, attributes = {}, text = "") {
    const svg = parent.closest("svg") !== null || name === "svg";
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return parent.appendChild(element);
  }

  class Sprite {
    constructor({ src, width, height, columns }) {
      Object.assign(this, { width, height, columns, image: new Image() });
      this.image.src = src;
      this.ready = this.image.decode();
    }

    draw(canvas, i, label) {
      const { width, height, columns } = this;
      if (canvas.width !== width) Object.assign(canvas, { width, height });
      const [x, y] = [(i % columns) * width, Math.floor(i / columns) * height];
      canvas.getContext("2d").drawImage(this.image, x, y, width, height, 0, 0, width, height);
      canvas.setAttribute("aria-label", label);
    }
  }

  // A row of images in a panel, headed by what it shows.
  function strip(panel, side, examples) {
    make(panel, "p", { class: "side", style: `--colour: var(--${side})` }, side);
    const row = make(panel, "div", { class: "strip", style: `--examples: ${examples}` });
    return { row, head: row.previousElementSibling, cells: Array.from({ length: examples }, () => make(row, "canvas", { role: "img" })) };
  }

  const nearest = (values, wanted) =>
    values.reduce((best, value, i) => (Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? i : best), 0);

  const time = (t) => `t = ${format(t)}`;

  // A slider that says its value, in words for those who hear it.
  function slider(id, say, changed) {
    const input = one(`#${id}`);
    const tell = () => {
      const text = say(Number(input.value));
      one(`#${id}-value`).textContent = text;
      input.setAttribute("aria-valuetext", text);
    };
    input.addEventListener("input", () => { tell(); changed(); });
    const api = {
      get value() { return Number(input.value); },
      set value(value) { input.value = value; tell(); },
      range(min, max, step, value) { Object.assign(input, { min, max, step, value }); tell(); },
      show() { one(`#${id}-box`).hidden = false; },
    };
    tell();
    return api;
  }

  const chosen = (section) => one(`input[name="${section}-name"]:checked`).value;
  const onChoice = (section, changed) => all(`input[name="${section}-name"]`).forEach((input) => input.addEventListener("change", changed));

  // The panels of a section: `build` makes one and returns what draws it.
  function panels(section, build) {
    return all(`#${section} .panel`).map((panel) => {
      const i = Number(panel.dataset.run);
      const draw = build(panel, runs[i][section], runs[i], i);
      const note = make(panel, "p", { class: "readout" });
      return (name) => {
        const k = name === undefined ? 0 : runs[i][section].names.indexOf(name);
        for (const child of panel.children) if (child !== note && !child.matches(".run")) child.hidden = k < 0;
        note.textContent = k < 0 ? `${words(name)} is no transformation of this run.` : draw(k, name) ?? "";
      };
    });
  }

  const label = (run, name) => (run.labels[name] === words(name) ? "" : run.labels[name]);

  // --- sections ------------------------------------------------------------------------------------------

  function traversals() {
    if (!one("#time")) return;
    const own = runs.map((run) => run.traversals).filter(Boolean);
    const last = Math.max(...own.map((each) => each.times.at(-1)));
    const step = Math.min(...own.map((each) => each.times[1] - each.times[0]));
    const draws = panels("traversals", (panel, { examples, times, true_times, whole, made, true: real }, run, i) => {
      const twin = make(panel, "div", { class: "twin" });
      const left = make(twin, "div");
      const [truth, generated] = ["true", "generated"].map((side) => strip(left, side, examples));
      const [real_, made_] = [new Sprite(real), new Sprite(made)];
      const errors = run.errors && chart(make(twin, "div"), { ylabel: "error of a frame, L1", xlabel: "t, frames", height: 220, from: [0, 0] });
      Promise.all([real_.ready, made_.ready]).then(() => update());
      return (k, name) => {
        const [n, m] = [nearest(times, clock.value), nearest(true_times, clock.value)];
        const alone = true_times.length === 1; // nobody knows what becomes of it
        const there = alone || Math.abs(true_times[m] - times[n]) < 1e-3;
        truth.row.classList.toggle("absent", !there);
        truth.head.textContent = alone ? "input" : there ? "true" : `true, ${time(true_times[m])}`;
        for (let s = 0; s < examples; s++) {
          const what = `${words(name)}, example ${s + 1}, ${time(times[n])}`;
          real_.draw(truth.cells[s], (k * examples + s) * true_times.length + m, `true, ${words(name)}, example ${s + 1}, ${time(true_times[m])}`);
          made_.draw(generated.cells[s], (k * examples + s) * times.length + n, `generated, ${what}`);
        }
        const values = run.errors?.[name];
        errors?.({ lines: values ? [{ x: values.map((_, t) => t + 1), y: values, colour: colour(i), name: words(name) }] : [], cursor: times[n], highest: worst(name) });
        const unknown = alone ? "What becomes of the input is not known, so that there are no true frames" : "";
        const between = whole && `Times between frames are left out: ${whole}`;
        return [label(run, name), unknown, between].filter(Boolean).map((said) => `${said}.`).join(" ");
      };
    });
    const worst = (name) => Math.max(...runs.flatMap((run) => run.errors?.[name] ?? []));
    const update = () => draws.forEach((draw) => draw(chosen("traversals")));
    const clock = slider("time", (t) => `${time(t)} of ${format(last)}`, update);
    clock.range(0, last, step, 0);
    onChoice("traversals", update);
    redraws.push(update);

    const play = one("#play");
    let timer = null;
    play.addEventListener("click", () => {
      clearInterval(timer);
      timer = timer === null ? setInterval(() => { clock.value = clock.value + step > last + 1e-6 ? 0 : clock.value + step; update(); }, 400 * Math.min(step, 0.5)) : null;
      play.setAttribute("aria-pressed", String(timer !== null));
      play.textContent = timer === null ? "Play" : "Pause";
    });
  }

  function mixtures() {
    const own = runs.map((run) => run.mixtures).filter(Boolean);
    if (!own.length) return;
    const names = [...new Set(own.flatMap((each) => each.names))];
    const draws = panels("mixtures", (panel, { names: mine, levels, times, examples, made, true: real }) => {
      const [real_, made_] = [real && new Sprite(real), new Sprite(made)];
      const twin = make(panel, "div", { class: "twin" });
      const truth = real_ && strip(make(twin, "div"), "true", examples);
      const generated = strip(make(twin, "div"), "generated", examples);
      Promise.all([real_?.ready, made_.ready]).then(() => update());
      return () => {
        const which = mine.map((name) => nearest(levels, weights[names.indexOf(name)].value));
        const n = nearest(times, clock.value);
        const place = which.reduce((sum, level) => sum * levels.length + level, 0);
        const parts = mine.map((name, i) => [levels[which[i]], words(name)]).filter(([weight]) => weight !== 0);
        const said = parts.map(([weight, name]) => `${format(weight)} ${name}`).join(" + ") || "at rest";
        for (let s = 0; s < examples; s++) {
          const i = (s * levels.length ** mine.length + place) * times.length + n;
          real_?.draw(truth.cells[s], i, `true, ${said}, example ${s + 1}`);
          made_.draw(generated.cells[s], i, `generated, ${said}, example ${s + 1}`);
        }
        const unknown = truth ? "" : " There are no true images: these data cannot be composed.";
        return `${said}, ${time(times[n])}.${unknown}`.replaceAll("+ −", "− ");
      };
    });
    const update = () => draws.forEach((draw) => draw());
    const weights = names.map((name, i) => {
      const [levels] = own.filter((each) => each.names.includes(name)).map((each) => each.levels).sort((a, b) => b.length - a.length);
      const control = slider(`weight-${i}`, (w) => `weight ${format(w)}`, update);
      control.range(levels[0], levels.at(-1), levels[1] - levels[0], i < 2 ? levels.at(-1) / (levels.length > 2 ? 2 : 1) : 0);
      return control;
    });
    const clock = slider("mixture-time", time, update);
    const last = Math.max(...own.map((each) => each.times.at(-1)));
    clock.range(own.some((each) => each.times.length > 1) ? 0 : last, last, 1, last);
    if (own.some((each) => each.times.length > 1)) clock.show();
    one("#rest").addEventListener("click", () => { weights.forEach((control) => { control.value = 0; }); update(); });
    redraws.push(update);
  }

  function landscapes() {
    const own = runs.map((run) => run.landscapes).filter(Boolean);
    if (!own.length) return;
    const draws = panels("landscapes", (panel, { side, flows, times, turned }, run) => {
      const canvas = make(panel, "canvas", { role: "img" });
      const scale = make(panel, "div", { class: "scale", "aria-hidden": "true" });
      const [low, strip_, high] = ["span", "span", "span"].map((name) => make(scale, name));
      strip_.style.background = `linear-gradient(90deg, ${shades.join(",")})`;
      drag(canvas);
      return (k, name) => {
        const { surfaces, extent, shares, paths } = flows[k];
        const n = surfaces.length > 1 ? nearest(times, clock.value) : 0;
        const [least, most] = [Math.min(...surfaces.flat()), Math.max(...surfaces.flat())];
        surface(canvas, { heights: surfaces[n], least, most, side, extent, paths });
        const parts = shares.map((share) => `${format(100 * share, 2)} %`).join(" and ");
        low.textContent = `u ${format(least, 3)}`;
        high.textContent = format(most, 3);
        canvas.setAttribute("aria-label", `Potential of ${words(name)} over two principal components, with ${paths.length} paths`);
        const plane = `The plane is ±${format(extent[0], 2)} by ±${format(extent[1], 2)} latent units; its components hold ${parts} of the variance.`;
        const beside = turned ? " A divergence-free part, which this surface does not show, moves states beside the gradient." : "";
        const when = surfaces.length > 1 ? ` ${time(times[n])}.` : own.some((each) => each.times.length > 1) ? " It does not depend on time." : "";
        const own_name = label(run, name);
        return `${own_name && `${own_name}. `}${plane}${beside}${when}`;
      };
    });
    const update = () => draws.forEach((draw) => draw(chosen("landscapes")));
    const degrees = (value) => `${value}°`;
    const turn = slider("turn", degrees, update);
    const tilt = slider("tilt", (value) => (value === 90 ? "from above" : degrees(value)), update);
    const clock = slider("instant", time, update);
    const moving = own.find((each) => each.times.length > 1);
    if (moving) {
      const { times } = moving;
      clock.range(times[0], times.at(-1), times[1] - times[0], times[0]);
      clock.show();
    }
    onChoice("landscapes", update);
    redraws.push(update);

    function drag(canvas) {
      canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
      canvas.addEventListener("pointermove", (event) => {
        if (!canvas.hasPointerCapture(event.pointerId)) return;
        turn.value = (turn.value + event.movementX + 360) % 360;
        if (event.pointerType === "mouse") tilt.value += event.movementY / 2;
        update();
      });
    }

    function surface(canvas, { heights, least, most, side, extent, paths }) {
      const width = canvas.clientWidth, height = Math.round(0.66 * width), sharp = window.devicePixelRatio || 1;
      if (!width) return;
      Object.assign(canvas, { width: width * sharp, height: height * sharp });
      const pen = canvas.getContext("2d");
      pen.scale(sharp, sharp);
      const [a, b] = [(turn.value * Math.PI) / 180, (tilt.value * Math.PI) / 180];
      const [cos, sin, up, flat] = [Math.cos(a), Math.sin(a), Math.cos(b), Math.sin(b)];
      const unit = Math.min(width / 3.1, height / 2.5), largest = Math.max(...extent), range = most - least || 1;
      const [ex, ey] = extent.map((e) => Math.max(e / largest, 0.35)); // a narrow plane is drawn wider, to be seen
      const lift = (u) => (u - least) / range - 0.5;
      const place = (x, y, h) => {
        const [far, right] = [x * sin + y * cos, x * cos - y * sin];
        return [width / 2 + right * unit, height / 2 - (far * flat + 0.9 * h * up) * unit, far];
      };
      const corner = (i, j) => place(ex * ((2 * j) / (side - 1) - 1), ey * ((2 * i) / (side - 1) - 1), lift(heights[i * side + j]));
      const cells = [];
      for (let i = 0; i + 1 < side; i++) {
        for (let j = 0; j + 1 < side; j++) {
          const points = [corner(i, j), corner(i, j + 1), corner(i + 1, j + 1), corner(i + 1, j)];
          const mean = (heights[i * side + j] + heights[(i + 1) * side + j + 1]) / 2;
          cells.push({ points, i, j, far: points[0][2] + points[2][2], shade: shades[Math.round(((mean - least) / range) * (shades.length - 1))] });
        }
      }
      cells.sort((one_, other) => other.far - one_.far); // the farthest first
      for (const { points, i, j, shade } of cells) {
        pen.beginPath();
        points.forEach(([x, y], n) => (n ? pen.lineTo(x, y) : pen.moveTo(x, y)));
        pen.closePath();
        pen.fillStyle = pen.strokeStyle = shade;
        pen.lineWidth = 0.8;
        pen.fill();
        pen.stroke();
        for (const [line, from, to] of [[i, 0, 1], [j, 0, 3]]) {
          if (line % 4) continue;
          pen.beginPath();
          pen.moveTo(points[from][0], points[from][1]);
          pen.lineTo(points[to][0], points[to][1]);
          pen.strokeStyle = "rgb(255 255 255 / 0.28)";
          pen.stroke();
        }
      }
      const style = getComputedStyle(document.documentElement);
      const [red, ink] = [style.getPropertyValue("--generated"), getComputedStyle(canvas).color];
      axes(pen, place, [ex, ey], ink, height);
      for (const path of paths) {
        const line = path.map(([x, y]) => place((ex * x) / extent[0], (ey * y) / extent[1], lift(height_at(heights, side, x / extent[0], y / extent[1])) + 0.01));
        for (const [stroke, wide] of [["rgb(255 255 255 / 0.75)", 3.4], [red, 1.8]]) {
          pen.beginPath();
          line.forEach(([x, y], n) => (n ? pen.lineTo(x, y) : pen.moveTo(x, y)));
          Object.assign(pen, { strokeStyle: stroke, lineWidth: wide, lineJoin: "round" });
          pen.stroke();
        }
        [[line[0], "white"], [line.at(-1), red]].forEach(([[x, y], fill]) => {
          pen.beginPath();
          pen.arc(x, y, 3, 0, 2 * Math.PI);
          Object.assign(pen, { fillStyle: fill, strokeStyle: red, lineWidth: 1.4 });
          pen.fill();
          pen.stroke();
        });
      }
    }

    // The sides of the plane that face the reader, and what runs along them.
    function axes(pen, place, [ex, ey], ink, height) {
      Object.assign(pen, { fillStyle: ink, strokeStyle: ink, lineWidth: 1, font: "12px system-ui, sans-serif", textBaseline: "middle" });
      const sides = [["component 1", [-ex, -ey], [ex, -ey]], ["component 1", [-ex, ey], [ex, ey]], ["component 2", [-ex, -ey], [-ex, ey]], ["component 2", [ex, -ey], [ex, ey]]];
      for (const pair of [sides.slice(0, 2), sides.slice(2)]) {
        const [text, from, to] = pair.reduce((near, side) => (low(side) > low(near) ? side : near));
        pen.beginPath();
        pen.moveTo(...place(...from, -0.5).slice(0, 2));
        pen.lineTo(...place(...to, -0.5).slice(0, 2));
        pen.stroke();
        const [x, y] = place((from[0] + to[0]) / 2, (from[1] + to[1]) / 2, -0.5);
        const [middle, depth] = place(0, 0, -0.5);
        const away = Math.hypot(x - middle, y - depth) || 1;
        pen.textAlign = x - middle > 20 ? "left" : x - middle < -20 ? "right" : "center";
        pen.fillText(text, x + (14 * (x - middle)) / away, Math.min(y + (14 * (y - depth)) / away, height - 8));
      }
      function low([, from, to]) { return place((from[0] + to[0]) / 2, (from[1] + to[1]) / 2, -0.5)[1]; }
    }
  }

  // The height of a surface at a point of the square [−1, 1]², between its grid points.
  function height_at(heights, side, x, y) {
    const [j, i] = [x, y].map((c) => Math.min(Math.max(((c + 1) / 2) * (side - 1), 0), side - 1.001));
    const [i0, j0] = [Math.floor(i), Math.floor(j)];
    const row = (r) => heights[r * side + j0] * (1 - j + j0) + heights[r * side + j0 + 1] * (j - j0);
    return row(i0) * (1 - i + i0) + row(i0 + 1) * (i - i0);
  }

  function curves() {
    const found = [...new Set(runs.flatMap((run) => Object.keys(run.curves ?? {})))];
    const titles = { loss: ["Loss", "nats a sequence"], "val/equivariance_error": ["Validation error", "equivariance error, L1"] };
    for (const name of found) {
      const [title, unit] = titles[name] ?? [words(name), ""];
      const panel = make(one("#charts"), "figure", { class: "panel" });
      make(panel, "h3", {}, title);
      const lines = runs.flatMap((run, i) => (run.curves?.[name] ? [{ x: run.curves[name][0], y: run.curves[name][1], colour: colour(i), name: run.name }] : []));
      const draw = chart(make(panel, "div"), { xlabel: "step", ylabel: unit, height: 240 });
      redraws.push(() => draw({ lines }));
    }
  }

  // Lines over an axis; what it returns draws them, and marks a place of the axis. `from`: least values that axes show.
  function chart(box, { xlabel, ylabel, height, from = [Infinity, Infinity] }) {
    const readout = make(box, "p", { class: "readout", "aria-live": "off" });
    return ({ lines, cursor, highest = -Infinity }) => {
      one("svg", box)?.remove();
      const width = box.clientWidth;
      if (!width || !lines.length) return;
      if (lines.every((line) => line.x.length < 2)) {
        readout.textContent = lines.map(({ name, x, y }) => `${name}: ${format(y[0])} ${ylabel}, at ${xlabel} ${format(x[0])}, the only value.`).join(" ");
        return;
      }
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      box.insertBefore(svg, readout);
      const [xs, ys] = [lines.flatMap((line) => line.x), lines.flatMap((line) => line.y)];
      const [xticks, yticks] = [ticks(Math.min(...xs, from[0]), Math.max(...xs), width / 90), ticks(Math.min(...ys, from[1]), Math.max(...ys, highest), height / 45, true)];
      const left = 10 + 7 * Math.max(...yticks.map((tick) => format(tick).length)), right = width - 12, top = 22, bottom = height - 34;
      const x0 = Math.min(xticks[0], ...xs), x1 = Math.max(xticks.at(-1), ...xs), y0 = Math.min(yticks[0], ...ys), y1 = Math.max(yticks.at(-1), ...ys);
      const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (right - left), py = (y) => bottom - ((y - y0) / (y1 - y0 || 1)) * (bottom - top);
      const said = lines.map(({ name, x, y }) => `${name}: ${format(y[0])} at ${format(x[0])} to ${format(y.at(-1))} at ${format(x.at(-1))}`).join("; ");
      Object.entries({ viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${ylabel} over ${xlabel}. ${said}` }).forEach(([key, value]) => svg.setAttribute(key, value));
      for (const tick of yticks) {
        make(svg, "line", { class: "grid", x1: left, x2: right, y1: py(tick), y2: py(tick) });
        make(svg, "text", { x: left - 6, y: py(tick) + 4, "text-anchor": "end" }, format(tick));
      }
      for (const tick of xticks) make(svg, "text", { x: px(tick), y: bottom + 16, "text-anchor": "middle" }, format(tick));
      make(svg, "text", { x: left - 6, y: 10, "text-anchor": "start" }, ylabel);
      make(svg, "text", { x: right, y: height - 4, "text-anchor": "end" }, xlabel);
      for (const line of lines) {
        make(svg, "polyline", { class: "curve", style: `stroke: ${line.colour}`, points: line.x.map((x, i) => `${px(x)},${py(line.y[i])}`).join(" ") });
        if (line.x.length < 12) line.x.forEach((x, i) => make(svg, "circle", { cx: px(x), cy: py(line.y[i]), r: 2.6, style: `fill: ${line.colour}` }));
      }
      const mark = make(svg, "line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
      const point = (x) => ["x1", "x2"].forEach((key) => mark.setAttribute(key, px(x))) ?? mark.setAttribute("visibility", "visible");
      if (cursor !== undefined) point(cursor);
      svg.addEventListener("pointermove", (event) => {
        const wanted = x0 + ((event.offsetX - left) / (right - left)) * (x1 - x0);
        const found = lines.map((line) => [line, nearest(line.x, wanted)]);
        if (cursor === undefined) point(found[0][0].x[found[0][1]]);
        readout.textContent = found.map(([line, i]) => `${line.name}: ${format(line.y[i])} at ${xlabel.split(",")[0]} ${format(line.x[i])}`).join("; ");
      });
    };
  }

  function ticks(least, most, wanted, around = false) {
    const rough = (most - least || Math.abs(most) || 1) / Math.max(Math.floor(wanted), 2);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const found = [];
    const [first, last] = around ? [Math.floor(least / step + 1e-9), Math.ceil(most / step - 1e-9)] : [Math.ceil(least / step - 1e-9), Math.floor(most / step + 1e-9)];
    for (let tick = first; tick <= last; tick++) found.push(Number((tick * step).toPrecision(12)));
    return found.length ? found : [least];
  }

  // --- the page ------------------------------------------------------------------------------------------

  const redraw = () => redraws.forEach((draw) => draw());
  const theme = one("#theme"), dark = window.matchMedia("(prefers-color-scheme: dark)");
  const is_dark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const say_theme = () => theme.setAttribute("aria-pressed", String(is_dark()));
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = is_dark() ? "light" : "dark"; say_theme(); redraw(); });
  dark.addEventListener("change", () => { say_theme(); redraw(); });
  one("#differing")?.addEventListener("change", (event) => one("#configuration").classList.toggle("only-differing", event.target.checked));

  traversals();
  mixtures();
  landscapes();
  curves();
  say_theme();
  redraw(); // only now is every panel as wide as it stays
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; redraw(); } });
})();

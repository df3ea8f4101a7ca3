"use strict";
// The map of an SAE's decoder rows: a point a latent, coloured by a measure, opposite pairs joined; click to open.
(function () {
  const { by, make, number, chip, state, data, notes } = tcsae;
  const RAMPS = { light: [[214, 160, 60], [200, 84, 48], [124, 32, 98], [30, 18, 72]], dark: [[88, 92, 170], [176, 86, 164], [248, 122, 92], [255, 226, 140]] };
  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  const labels = {};
  let view = { x: 0, y: 0, scale: 1 }, chosen = null, places = [], ranks = [], drag = null, place = {};

  const canvas = by("map"), context = canvas.getContext("2d");
  const styles = () => getComputedStyle(document.documentElement);
  const isDark = () => styles().colorScheme.includes("dark");

  // Ranks from 0 to 1: most measures have a long tail, which would give nearly all points one colour.
  function rank(values) {
    const known = values.map((value, i) => [value, i]).filter(([value]) => value !== null).sort((a, b) => a[0] - b[0]);
    const found = values.map(() => null);
    known.forEach(([value, i], k) => { found[i] = k && known[k - 1][0] === value ? found[known[k - 1][1]] : k / Math.max(1, known.length - 1); });
    return found;
  }

  function colour(share) {
    if (share === null) return styles().getPropertyValue("--grid");
    const ramp = RAMPS[isDark() ? "dark" : "light"];
    const at = Math.min(ramp.length - 2, Math.floor(share * (ramp.length - 1))), rest = share * (ramp.length - 1) - at;
    return `rgb(${ramp[at].map((value, k) => Math.round(value + rest * (ramp[at + 1][k] - value))).join(",")})`;
  }

  const size = () => Math.min(canvas.clientWidth, canvas.clientHeight) / 2 - 14;
  const toScreen = ([x, y]) => [canvas.clientWidth / 2 + (x - view.x) * view.scale * size(), canvas.clientHeight / 2 - (y - view.y) * view.scale * size()];
  const toMap = (px, py) => [(px - canvas.clientWidth / 2) / (view.scale * size()) + view.x, -(py - canvas.clientHeight / 2) / (view.scale * size()) + view.y];

  function draw() {
    const ratio = devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const at = places.map(toScreen);
    if (by("pairs").checked) {
      context.strokeStyle = styles().getPropertyValue("--ink-2");
      context.globalAlpha = 0.35;
      context.beginPath();
      for (const [a, b] of data.map.pairs) { context.moveTo(...at[place[a]]); context.lineTo(...at[place[b]]); }
      context.stroke();
    }
    const radius = Math.max(1.6, Math.min(5, (60 * Math.sqrt(view.scale)) / Math.sqrt(places.length + 1)));
    context.globalAlpha = 0.9;
    const colours = Array.from({ length: 33 }, (_, k) => colour(k / 32)), none = colour(null);
    at.forEach(([x, y], i) => {
      context.fillStyle = ranks[i] === null ? none : colours[Math.round(32 * ranks[i])];
      context.beginPath();
      context.arc(x, y, radius, 0, 7);
      context.fill();
    });
    context.globalAlpha = 1;
    if (chosen !== null) {
      const [x, y] = at[chosen];
      context.strokeStyle = styles().getPropertyValue("--ink");
      context.lineWidth = 2;
      context.beginPath();
      context.arc(x, y, radius + 4, 0, 7);
      context.stroke();
      context.lineWidth = 1;
    }
    legend();
  }

  function legend() {
    const name = by("colour").value;
    const values = (name === "latent" ? data.index.latents : data.index.columns[name]).filter((value) => value !== null).sort((a, b) => a - b);
    const middle = values[Math.floor(values.length / 2)];
    by("ramp").style.background = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(colour).join(",")})`;
    by("ramp-low").textContent = number(values[0]);
    by("ramp-middle").textContent = `median ${number(middle)}`;
    by("ramp-high").textContent = number(values.at(-1));
  }

  function choose(i, remember = true) {
    chosen = i;
    const latent = data.index.latents[i], name = by("colour").value;
    const opposite = data.map.pairs.filter((pair) => pair[0] === latent || pair[1] === latent).map(([a, b, cosine]) => [a === latent ? b : a, cosine]);
    const link = (other, words) => make("a", { href: `features.html#latent=${other}`, "data-latent": other }, words);
    by("chosen").replaceChildren(
      make("h2", {}, link(latent, `Latent ${latent}`)), make("p", {}, ...data.index.fires[i].map((token) => chip(token))),
      make("p", {}, `${labels[name] ?? "number"}: ${number(name === "latent" ? latent : data.index.columns[name][i])}`),
      ...(opposite.length ? [make("p", {}, "Opposite: ", ...opposite.flatMap(([other, cosine]) => [link(other, String(other)), ` ${number(cosine)} `]))] : []));
    notes.show(by("chosen"));
    if (remember) state.replace({ latent });
    draw();
  }

  function nearest(x, y, among = () => true) {
    let best = null, least = Infinity;
    places.forEach(([px, py], i) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least && among(px, py, i)) { least = distance; best = i; }
    });
    return [best, Math.sqrt(least) * view.scale * size()];
  }

  const under = (event) => { const box = canvas.getBoundingClientRect(); return toMap(event.clientX - box.left, event.clientY - box.top); };

  function zoom(factor, [x, y] = [view.x, view.y]) {
    const scale = Math.max(1, Math.min(60, view.scale * factor)), share = 1 - view.scale / scale;
    view = scale === 1 ? { x: 0, y: 0, scale } : { x: view.x + (x - view.x) * share, y: view.y + (y - view.y) * share, scale };
    draw();
  }

  // Arrow keys go to the nearest point in a direction; Enter opens it.
  function keys(event) {
    const step = STEPS[event.key];
    if (event.key === "+" || event.key === "-") zoom(event.key === "+" ? 1.5 : 1 / 1.5);
    if (event.key === "Enter" && chosen !== null) location.href = `features.html#latent=${data.index.latents[chosen]}`;
    if (!step) return;
    event.preventDefault();
    if (chosen === null) { choose(nearest(view.x, view.y)[0]); return; }
    const [x, y] = places[chosen];
    const [i] = nearest(x, y, (px, py, other) => other !== chosen && (px - x) * step[0] + (py - y) * step[1] > Math.hypot(px - x, py - y) * 0.7);
    if (i !== null) choose(i);
  }

  function listen() {
    canvas.addEventListener("pointerdown", (event) => { drag = { from: under(event), moved: 0, x: event.clientX, y: event.clientY }; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", (event) => {
      if (!drag) return;
      drag.moved = Math.max(drag.moved, Math.hypot(event.clientX - drag.x, event.clientY - drag.y));
      if (drag.moved < 4 || view.scale === 1) return;
      const [x, y] = under(event);
      view.x += drag.from[0] - x;
      view.y += drag.from[1] - y;
      draw();
    });
    canvas.addEventListener("pointerup", (event) => {
      const clicked = drag && drag.moved < 4;
      drag = null;
      if (!clicked) return;
      const [i, distance] = nearest(...under(event));
      if (i === null || distance > 24) return;
      if (i === chosen) location.href = `features.html#latent=${data.index.latents[i]}`; else choose(i);
    });
    canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.25 : 0.8, under(event)); }, { passive: false });
    canvas.addEventListener("keydown", keys);
    by("zoom-in").addEventListener("click", () => zoom(1.5));
    by("zoom-out").addEventListener("click", () => zoom(1 / 1.5));
    by("pairs").addEventListener("change", () => { state.replace({ pairs: by("pairs").checked ? null : 0 }); draw(); });
    by("colour").addEventListener("change", () => { state.replace({ colour: by("colour").value }); apply(); });
    by("method").addEventListener("change", () => { state.replace({ method: by("method").value }); apply(); });
    addEventListener("hashchange", apply);
    addEventListener("resize", draw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    by("theme").addEventListener("click", () => setTimeout(draw));
  }

  // What the URL says.
  function apply() {
    const parameters = state.read(), columns = data.index.columns;
    const wanted = parameters.get("colour");
    by("colour").value = wanted && (wanted === "latent" || columns[wanted]) ? wanted : "rho_8_within";
    by("method").value = data.map.places[parameters.get("method")] ? parameters.get("method") : Object.keys(data.map.places).at(-1);
    by("pairs").checked = parameters.get("pairs") !== "0";
    places = data.map.places[by("method").value];
    ranks = rank(by("colour").value === "latent" ? data.index.latents : columns[by("colour").value]);
    const i = place[parameters.get("latent")];
    if (i === undefined) draw(); else choose(i, false);
  }

  document.addEventListener("DOMContentLoaded", () => {
    if (!data.index || !data.map) { by("chosen").textContent = "data/map.js is missing: the report's folder is not whole."; return; }
    for (const option of by("colour").options) labels[option.value] = option.textContent;
    by("method").replaceChildren(...Object.keys(data.map.places).map((name) => make("option", { value: name }, name)));
    data.index.latents.forEach((latent, i) => { place[latent] = i; });
    listen();
    apply();
    canvas.dataset.ready = places.length;
  });
})();

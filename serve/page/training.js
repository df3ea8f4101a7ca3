"use strict";
// The training curves of every run below --runs, asked for again every two seconds.
(function () {
  const { by, make, number } = tcsae;
  const EVERY_MS = 2000, WIDTH = 760, HEIGHT = 260, LEFT = 56, RIGHT = 16, BOTTOM = 30;
  let last = "";

  function draw(curves) {
    const name = by("curve").value;
    const series = curves.map((curve) => ({ name: curve.name, points: curve.step.map((step, i) => [step, curve[name][i]]).filter(([, y]) => y !== null && y !== undefined) }))
      .filter((one) => one.points.length);
    if (!series.length) { by("training").replaceChildren(make("p", { class: "note" }, "No run has a logged step yet.")); return; }
    const every = series.flatMap((one) => one.points);
    const steps = every.map(([step]) => step), sorted = every.map(([, y]) => y).sort((a, b) => a - b);
    const low = sorted[Math.floor(sorted.length * 0.04)], high = sorted.at(-1); // the first steps would squeeze the rest
    const most = Math.max(1, ...steps);
    const x = (step) => LEFT + (step / most) * (WIDTH - LEFT - RIGHT);
    const y = (value) => 10 + ((high - Math.max(low, value)) / (high - low || 1)) * (HEIGHT - BOTTOM - 14);
    const dashes = ["", "7 3", "2 3", "7 3 2 3"];
    const words = (px, py, anchor, text) => make("svg:text", { x: px, y: py, "text-anchor": anchor }, text);
    const lines = series.map((one, i) => make("svg:path", { d: one.points.map(([step, value], k) => `${k ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join(""),
      style: `stroke:var(--c${1 + (i % 6)});stroke-width:1.8;stroke-dasharray:${dashes[i % 4]}` }));
    const told = series.map((one) => `${one.name}: ${number(one.points.at(-1)[1])} at step ${one.points.at(-1)[0].toLocaleString("en")}`);
    by("training").replaceChildren(
      make("svg:svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart training", role: "img", "aria-label": told.join("; ") },
        make("svg:path", { d: `M${LEFT} ${HEIGHT - BOTTOM}H${WIDTH - RIGHT}`, class: "zero" }), ...lines,
        words(LEFT - 6, 16, "end", number(high)), words(LEFT - 6, HEIGHT - BOTTOM, "end", number(low)),
        words(LEFT, HEIGHT - 10, "start", "step 0"), words(WIDTH - RIGHT, HEIGHT - 10, "end", most.toLocaleString("en"))),
      make("ul", { class: "plain legend-list" }, ...told.map((text, i) => make("li", {}, make("span", { class: "swatch", style: `border-color:var(--c${1 + (i % 6)})` }), text))));
    by("training").dataset.steps = most;
  }

  async function update() {
    try {
      const { curves } = await tcsae.ask("training");
      const now = JSON.stringify(curves) + by("curve").value;
      if (now !== last) { last = now; draw(curves); }
    } catch (error) {
      by("training").replaceChildren(make("p", { class: "warn" }, `No answer: ${error.message}`));
      last = "";
    }
    setTimeout(update, EVERY_MS);
  }

  document.addEventListener("DOMContentLoaded", () => {
    by("curve").addEventListener("change", () => { last = ""; });
    update();
  });
})();

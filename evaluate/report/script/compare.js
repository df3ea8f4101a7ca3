"use strict";
// Two SAEs, matched by the cosine of decoder rows: what both have, what each has alone, and a measure of matched latents
// against each other.
(function () {
  const { by, make, number, chip, load, state, data, notes } = tcsae;
  const SHOWN = 40;
  let sides = null;

  async function read(a, b) {
    await load(`compare/${a.number}-${b.number}.js`);
    const pair = data.pairs[`${a.number}-${b.number}`];
    const found = [];
    for (const [run, best] of [[a, pair.a], [b, pair.b]]) {
      data.index = null;
      if (!read.indexes[run.number]) {
        await load(`runs/${run.path}/data/index.js`);
        read.indexes[run.number] = data.index;
      }
      const index = read.indexes[run.number];
      found.push({ run, index, place: new Map(index.latents.map((latent, i) => [latent, i])), best: best ? best[0] : [], cosine: best ? best[1] : [] });
    }
    return found;
  }
  read.indexes = {};

  const from = () => { const asked = Number(state.read().get("from") ?? 0.7); return asked >= 0 && asked <= 1 ? asked : 0.7; };

  async function show() {
    const parameters = state.read();
    const pick = (key, otherwise) => data.runs.find((run) => String(run.number) === parameters.get(key)) || otherwise;
    let a = pick("a", data.runs[0]), b = pick("b", data.runs.find((run) => run !== a && run.group === a.group));
    if (!b || a === b || a.group !== b.group) b = data.runs.find((run) => run !== a && run.group === a.group);
    if (!b) { by("verdict").textContent = `${a.name} has no other SAE of its hook to be compared with.`; return; }
    by("a").value = a.number; by("b").value = b.number;
    const turned = a.number > b.number;
    try {
      sides = turned ? (await read(b, a)).reverse() : await read(a, b);
    } catch (error) { by("verdict").textContent = error.message; return; }
    by("from").value = from();
    const measure = parameters.get("measure");
    by("measure").value = [...by("measure").options].some((option) => option.value === measure) ? measure : "rho_8_within";
    draw();
  }

  function draw() {
    const [a, b] = sides, least = from();
    const both = a.index.latents.map((latent, i) => [i, b.place.get(a.best[i])]).filter(([i, j]) => a.cosine[i] >= least && b.best[j] === a.index.latents[i]);
    const alone = (side) => side.index.latents.map((_, i) => i).filter((i) => side.cosine[i] < least);
    const lonely = [alone(a), alone(b)];
    const percent = (n, of) => `${Math.round((100 * n) / Math.max(1, of))}%`;
    by("verdict").textContent = `${both.length.toLocaleString("en")} latents are each other's nearest at a cosine of ${number(least)} or more: `
      + `${percent(both.length, a.index.latents.length)} of ${a.run.name}, ${percent(both.length, b.index.latents.length)} of ${b.run.name}. `
      + `Without a match: ${lonely[0].length.toLocaleString("en")} of ${a.run.name}, ${lonely[1].length.toLocaleString("en")} of ${b.run.name}.`;
    scatter(both);
    [a, b].forEach((side, k) => onlyIn(by(k ? "only-b" : "only-a"), side, lonely[k], [b, a][k]));
    tcsae.wide();
    by("compare").dataset.ready = `${a.run.number}-${b.run.number}`;
  }

  const measured = (side, i) => side.index.columns[by("measure").value][i];

  function onlyIn(box, side, lonely, other) {
    const name = by("measure").value;
    const sorted = [...lonely].sort((i, j) => (measured(side, j) ?? -Infinity) - (measured(side, i) ?? -Infinity)).slice(0, SHOWN);
    const label = by("measure").selectedOptions[0].textContent;
    const term = make("a", { class: "term", href: by("measure").selectedOptions[0].dataset.term }, label);
    const link = (run, latent, weights) => make("a", { href: `runs/${run.path}/features.html#latent=${latent}`, "data-latent": latent, "data-weights": weights }, String(latent));
    const rows = sorted.map((i) => make("tr", {}, make("th", { scope: "row" }, link(side.run, side.index.latents[i], side.index.weights)),
      make("td", { class: "fires" }, ...side.index.fires[i].slice(0, 3).map((token) => chip(token))), make("td", { class: "n" }, number(side.index.columns[name][i])),
      make("td", { class: "n" }, number(side.cosine[i])), make("td", {}, side.best.length ? link(other.run, side.best[i], other.index.weights) : "–")));
    box.replaceChildren(make("h2", {}, `What has ${side.run.name} that ${other.run.name} has not?`),
      make("p", { class: "note" }, `${lonely.length.toLocaleString("en")} latents${lonely.length > SHOWN ? `; the ${SHOWN} with the largest ${label}` : ""}`),
      ...(rows.length ? [make("div", { class: "wide" }, make("table", {}, make("thead", {}, make("tr", {},
        ...["latent", "fires on", term, "best cosine", "with"].map((head, k) => make("th", { scope: "col", ...(k === 2 || k === 3 ? { class: "n" } : {}) }, head)))), make("tbody", {}, ...rows)))] : []));
    notes.show(box);
  }

  function scatter(both) {
    const [a, b] = sides, points = both.map(([i, j]) => [measured(a, i), measured(b, j), a.index.latents[i], b.index.latents[j]]).filter(([x, y]) => x !== null && y !== null);
    const box = by("scatter");
    if (points.length < 2) { box.replaceChildren(make("p", { class: "note" }, "Fewer than two matched latents have this measure.")); return; }
    const size = 420, left = 52, low = Math.min(...points.flatMap(([x, y]) => [x, y])), high = Math.max(...points.flatMap(([x, y]) => [x, y]));
    const log = low > 0 && high / low > 50; // densities span decades
    const scale = (value) => log ? Math.log(value) : value;
    const share = (value) => (scale(value) - scale(low)) / (scale(high) - scale(low) || 1);
    const x = (value) => left + share(value) * (size - left - 12), y = (value) => size - 40 - share(value) * (size - 52);
    const text = (px, py, anchor, words, extra) => make("svg:text", { x: px, y: py, "text-anchor": anchor, ...extra }, words);
    const above = points.filter(([p, q]) => q > p).length;
    const label = by("measure").selectedOptions[0].textContent;
    const marks = points.map(([p, q, one, other]) => {
      const mark = make("svg:circle", { cx: x(p).toFixed(1), cy: y(q).toFixed(1), r: points.length > 800 ? 2 : 3 });
      mark.append(make("svg:title", {}, `${one} and ${other}: ${number(p)}, ${number(q)}`));
      mark.addEventListener("click", () => { location.href = `runs/${a.run.path}/features.html#latent=${one}`; });
      return mark;
    });
    box.replaceChildren(make("svg:svg", { viewBox: `0 0 ${size} ${size}`, class: "scatter", role: "img", "aria-label": `${label} of ${points.length} matched latents; larger in ${b.run.name} for ${above}` },
      make("svg:path", { d: `M${x(low)} ${y(low)}L${x(high)} ${y(high)}`, class: "diagonal" }),
      make("svg:path", { d: `M${left} ${size - 40}H${size - 12}M${left} ${size - 40}V12`, class: "zero" }), ...marks,
      text(left, size - 24, "start", number(low)), text(size - 12, size - 24, "end", number(high)), text(left - 6, size - 40, "end", number(low)), text(left - 6, 20, "end", number(high)),
      text((left + size) / 2, size - 8, "middle", `${label} in ${a.run.name}${log ? " (log scale)" : ""}`),
      text(0, 0, "middle", `in ${b.run.name}`, { transform: `translate(12 ${size / 2 - 10}) rotate(-90)` })),
      make("p", { class: "told" }, `Larger in ${b.run.name} for ${above.toLocaleString("en")} of ${points.length.toLocaleString("en")} matched latents; the line is where both are equal.`));
  }

  document.addEventListener("DOMContentLoaded", () => {
    data.pairs = {};
    tcsae.pair = (name, pair) => { data.pairs[name] = pair; };
    for (const id of ["a", "b"]) {
      by(id).replaceChildren(...data.runs.map((run) => make("option", { value: run.number }, `${run.number} ${run.name}`)));
      by(id).addEventListener("change", () => state.push({ a: by("a").value, b: by("b").value }));
    }
    by("turn").addEventListener("click", () => state.push({ a: by("b").value, b: by("a").value }));
    by("measure").addEventListener("change", () => { state.replace({ measure: by("measure").value }); draw(); });
    by("from").addEventListener("change", () => { state.replace({ from: by("from").value }); draw(); });
    addEventListener("hashchange", show);
    show();
  });
})();

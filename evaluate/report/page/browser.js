"use strict";
// The feature browser. Data come as classic scripts, which call tcsae.index(...), .features(...), .sequences(...) and
// .vocabulary(...), since nothing else can be read where a page opens from disk. All text is set as text, never as HTML.
(function () {
  const ROWS = 60;
  const SVG = "http://www.w3.org/2000/svg";
  const by = (id) => document.getElementById(id);
  const root = by("browser").dataset.root;
  const data = { index: null, features: {}, sequences: {}, vocabulary: {} };
  const labels = {};
  let shown = [], limit = ROWS, current = null, place = {};

  window.tcsae = {
    index: (index) => { data.index = index; },
    features: (chunk) => Object.assign(data.features, chunk),
    sequences: (rows) => Object.assign(data.sequences, rows),
    vocabulary: (texts) => { data.vocabulary = texts; },
  };

  // Elements: make("p", {class: "note"}, "text", child, ...)
  function make(name, attributes, ...children) {
    const element = name.includes(":") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  const number = (value) => {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  };
  const text = (token) => data.vocabulary[token] ?? `⟨${token}⟩`;
  // In lists a space is shown as a sign: it is part of the token.
  const chip = (token) => make("bdi", { class: "chip" }, text(token).replaceAll(" ", "␣"));

  // ---- Scripts on demand, each once
  const loading = {};
  function load(path) {
    loading[path] ??= new Promise((resolve, reject) => {
      const script = make("script", { src: path });
      script.onload = resolve;
      script.onerror = () => { delete loading[path]; reject(new Error(`${path} is missing: the report's folder is not whole.`)); };
      document.head.append(script);
    });
    return loading[path];
  }

  // ---- The list: search, filters, order
  const column = (name) => (name === "latent" ? data.index.latents : data.index.columns[name]);

  function quantile(name, share, among = () => true) {
    const values = column(name).filter((value, i) => value !== null && among(i)).sort((a, b) => a - b);
    return values.length ? values[Math.round(share * (values.length - 1))] : null;
  }

  const PRESETS = {
    slow: () => { // the slowest of the rare: the slowest of all are dense
      const rare = quantile("density", 0.25);
      const slow = quantile("rho_8_within", 0.8, (i) => column("density")[i] <= rare);
      return { filters: { rho_8_within: [slow, null], density: [null, rare] }, sort: "rho_8_within" };
    },
    position: () => ({ filters: { position_share: [Math.max(quantile("position_share", 0.95), 0.001), null] }, sort: "position_share" }),
    document: () => ({ filters: { document_share: [quantile("document_share", 0.9), null] }, sort: "document_share" }),
    token: () => ({ filters: { token_share: [quantile("token_share", 0.9), null] }, sort: "token_share" }),
    dense: () => ({ filters: { density: [Math.min(0.1, quantile("density", 0.98)), null] }, sort: "density" }),
    twins: () => ({ filters: { decoder_cosine: [Math.min(0.9, quantile("decoder_cosine", 0.95)), null] }, sort: "decoder_cosine" }),
    "": () => ({ filters: {}, sort: "rho_8_within" }),
  };

  function usePreset(name) {
    const preset = PRESETS[name]();
    for (const input of document.querySelectorAll("[data-filter]")) {
      const value = (preset.filters[input.dataset.filter] || [])[input.dataset.end];
      input.value = value ?? "";
    }
    if (!name) by("search").value = "";
    by("sort").value = preset.sort;
    setOrder(true);
    by("filters").open = Boolean(name);
    for (const button of document.querySelectorAll("[data-preset]")) {
      button.setAttribute("aria-pressed", String(Boolean(name) && button.dataset.preset === name));
    }
    list();
  }

  function setOrder(descending) {
    by("order").setAttribute("aria-pressed", String(descending));
    by("order").textContent = descending ? "largest first" : "smallest first";
  }

  function searched() {
    const query = by("search").value;
    const asked = query.trim().toLowerCase();
    if (!asked) return () => true;
    const found = new Set();
    for (const [token, one] of Object.entries(data.vocabulary)) if (one.toLowerCase().includes(asked)) found.add(Number(token));
    const promoted = by("promoted")?.checked && data.index.promotes;
    return (i) => String(data.index.latents[i]) === asked || data.index.fires[i].some((token) => found.has(token))
      || Boolean(promoted && promoted[i].some((token) => found.has(token)));
  }

  function list() {
    const tests = [searched()];
    for (const input of document.querySelectorAll("[data-filter]")) {
      if (input.value === "" || !Number.isFinite(input.valueAsNumber)) continue;
      const values = column(input.dataset.filter), bound = input.valueAsNumber, sign = input.dataset.end === "0" ? 1 : -1;
      tests.push((i) => values[i] !== null && sign * (values[i] - bound) >= 0);
    }
    const values = column(by("sort").value), sign = by("order").getAttribute("aria-pressed") === "true" ? -1 : 1;
    shown = data.index.latents.map((_, i) => i).filter((i) => tests.every((test) => test(i)));
    shown.sort((a, b) => (values[a] === null) - (values[b] === null) || sign * (values[a] - values[b]) || a - b);
    limit = ROWS;
    draw();
  }

  function draw() {
    const sort = by("sort").value;
    by("list").replaceChildren(...shown.slice(0, limit).map((i) => row(i, sort)));
    by("more").hidden = shown.length <= limit;
    by("count").textContent = `${shown.length.toLocaleString("en")} of ${data.index.latents.length.toLocaleString("en")} live latents`;
    by("sorted-by").textContent = sort === "latent" ? "density" : labels[sort];
  }

  function row(i, sort) {
    const latent = data.index.latents[i];
    const measure = sort === "latent" ? "density" : sort;
    const link = make("a", { href: `#${latent}` },
      make("span", { class: "id" }, String(latent)),
      make("span", { class: "chips" }, ...data.index.fires[i].slice(0, 4).map(chip)),
      make("span", { class: "value" }, number(column(measure)[i])));
    if (latent === current) link.setAttribute("aria-current", "true");
    return make("li", {}, link);
  }

  // ---- One feature
  async function open(latent) {
    const i = place[latent];
    const box = by("feature");
    if (i === undefined) {
      box.replaceChildren(make("p", { class: "note" }, `Latent ${latent} is not among the live latents of this SAE.`));
      return;
    }
    current = latent;
    for (const link of by("list").querySelectorAll("a")) {
      if (link.hash === `#${latent}`) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    }
    try {
      await load(`data/${Math.floor(latent / data.index.per_chunk)}.js`);
      const files = new Set(data.features[latent].contexts.map(([sequence]) => Math.floor(sequence / data.index.per_file)));
      await Promise.all(Array.from(files, (file) => load(`${root}sequences/${file}.js`)));
    } catch (error) {
      box.replaceChildren(make("p", { class: "warn" }, error.message));
      return;
    }
    if (current !== latent) return;
    document.title = `Latent ${latent}`;
    const feature = data.features[latent];
    box.replaceChildren(heading(latent, i), summary(feature, i), ...contexts(feature, i));
    box.dataset.latent = latent;
  }

  function step(by_) {
    const at = shown.indexOf(place[current]) + by_;
    if (at >= 0 && at < shown.length) location.hash = `#${data.index.latents[shown[at]]}`;
  }

  function heading(latent, i) {
    const group = data.index.group ? (data.index.group[i] === 0 ? "first group" : `group ${data.index.group[i] + 1}`) : "";
    const previous = make("button", { type: "button", title: "Previous of the list (k)" }, "‹ previous");
    const next = make("button", { type: "button", title: "Next of the list (j)" }, "next ›");
    previous.addEventListener("click", () => step(-1));
    next.addEventListener("click", () => step(1));
    return make("header", { class: "feature-head" },
      make("h2", {}, `Latent ${latent}`, ...(group ? [" ", make("small", {}, group)] : [])),
      make("p", { class: "fires" }, "fires on ", ...data.index.fires[i].map(chip)),
      make("div", { class: "steps" }, previous, next, make("a", { href: `#${latent}`, class: "quiet" }, "link to this feature")));
  }

  function summary(feature, i) {
    const total = data.index.latents.length;
    const rows = Object.keys(labels).map((name) => {
      const value = column(name)[i];
      const below = value === null ? 0 : column(name).filter((other) => other !== null && other < value).length;
      const rank = Math.round((100 * below) / Math.max(1, total - 1));
      return make("tr", {}, make("th", { scope: "row" }, labels[name]), make("td", { class: "n" }, number(value)),
        make("td", { class: "rank", title: `larger than ${rank}% of live latents` },
          make("span", { class: "meter" }, make("span", { style: `width:${value === null ? 0 : rank}%` })), value === null ? "" : `${rank}%`));
    });
    const side = [make("h3", {}, "Persistence ", make("small", {}, "autocorrelation over lags, within documents")), rhoCurve(feature)];
    if (feature.up) side.push(lens("Promotes", feature.up), lens("Suppresses", feature.down));
    else side.push(make("p", { class: "note" }, `No logit lens. ${by("no-lens").textContent}`));
    side.push(neighbours("Nearest by decoder cosine", feature.near), neighbours("Fires together with", feature.together));
    return make("div", { class: "summary" },
      make("table", { class: "measures" }, make("caption", {}, "Its measures, and the share of live latents below"), make("tbody", {}, ...rows)),
      make("div", {}, ...side));
  }

  function lens(title, pairs) {
    return make("div", { class: "pairs" }, make("h3", {}, title),
      make("p", {}, ...pairs.flatMap(([token, change]) => [chip(token), make("small", {}, `${change > 0 ? "+" : "−"}${number(Math.abs(change))} `)])));
  }

  function neighbours(title, pairs) {
    const links = pairs.map(([latent, likeness]) => make("li", {}, make("a", { href: `#${latent}` }, String(latent)), " ",
      make("small", {}, number(likeness)), " ", ...(data.index.fires[place[latent]] || []).slice(0, 2).map(chip)));
    return make("div", { class: "pairs" }, make("h3", {}, title), pairs.length ? make("ul", {}, ...links) : make("p", { class: "note" }, "none"));
  }

  function rhoCurve(feature) {
    const width = 320, height = 92, left = 30, bottom = 16;
    const values = feature.rho, known = values.filter((value) => value !== null);  // null: no pair at that lag
    const high = Math.max(0.1, ...known), low = Math.min(0, ...known, feature.null ?? 0);
    const x = (lag) => left + ((lag - 1) / Math.max(1, values.length - 1)) * (width - left - 6);
    const y = (value) => 6 + ((high - value) / (high - low)) * (height - bottom - 10);
    const path = values.map((value, k) => value === null ? "" :
      `${k && values[k - 1] !== null ? "L" : "M"}${x(k + 1).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const level = (value, name) => make("svg:path", { d: `M${left} ${y(value)}H${width - 6}`, class: name });
    const label = (px, py, told, anchor) => make("svg:text", { x: px, y: py, "text-anchor": anchor }, told);
    const told = `Autocorrelation ${number(values[0])} at lag 1, ${number(values[7])} at lag 8; with positions permuted ${number(feature.null)}`;
    return make("svg:svg", { viewBox: `0 0 ${width} ${height}`, class: "rho", role: "img", "aria-label": told },
      level(0, "zero"), ...(feature.null === null ? [] : [level(feature.null, "null")]), make("svg:path", { d: path, class: "curve" }),
      label(left - 4, y(high) + 4, number(high), "end"), label(left - 4, y(0) + 3, "0", "end"),
      label(x(1), height - 3, "lag 1", "start"), label(x(values.length), height - 3, String(values.length), "end"));
  }

  // ---- Sequences
  function contexts(feature, i) {
    const parts = [];
    const quantiles = new Map();
    for (const context of feature.contexts) {
      const key = context[1] === null ? "Strongest sequences" : `Around the ${ordinal(Math.round(100 * context[1]))} percentile of its sequences`;
      quantiles.set(key, [...(quantiles.get(key) || []), context]);
    }
    for (const [title, some] of quantiles) {
      parts.push(make("section", { class: "contexts" }, make("h3", {}, title), ...some.map((one) => sequence(one, column("max")[i]))));
    }
    return parts;
  }

  const ordinal = (n) => `${n}${n % 10 === 1 && n !== 11 ? "st" : n % 10 === 2 && n !== 12 ? "nd" : n % 10 === 3 && n !== 13 ? "rd" : "th"}`;

  function sequence([number_, , positions, values], largest) {
    const [document_, start, tokens] = data.sequences[number_];
    const peak = Math.max(...values);
    const at = new Map(positions.map((position, k) => [position, values[k]]));
    const readout = make("output", { class: "readout" }, `peak ${number(peak)}`);
    const body = make("p", { class: "tokens", dir: "ltr" });
    let first = true, framed = false;
    tokens.forEach((token, position) => {
      const value = at.get(position);
      if (value === undefined) { body.append(make("bdi", {}, text(token))); return; }
      const share = Math.min(1, value / largest);
      const isPeak = value === peak && !framed;
      framed ||= isPeak;
      const span = make("bdi", {
        class: `on s${Math.min(4, 1 + Math.floor(share * 4))}${isPeak ? " peak" : ""}`, style: `--a:${(0.1 + 0.75 * share).toFixed(2)}`,
        tabindex: first ? "0" : "-1", title: `${number(value)}, position ${start + position}`,
      }, text(token));
      span.dataset.told = `${text(token).replaceAll(" ", "␣")}: ${number(value)}, position ${position} of the sequence`;
      first = false;
      body.append(span);
    });
    const tell = (event) => { if (event.target.dataset?.told) readout.textContent = event.target.dataset.told; };
    body.addEventListener("mouseover", tell);
    body.addEventListener("focusin", tell);
    body.addEventListener("keydown", (event) => walk(event, body));
    return make("article", { class: "context" },
      make("header", {}, make("span", {}, `document ${document_.toLocaleString("en")}, tokens ${start} to ${start + tokens.length - 1}`), readout),
      body, strip(tokens.length, at, largest));
  }

  // Left and right go from one active token to the next.
  function walk(event, body) {
    const direction = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!direction) return;
    const all = Array.from(body.querySelectorAll(".on"));
    const next = all[all.indexOf(document.activeElement) + direction];
    if (!next) return;
    event.preventDefault();
    for (const one of all) one.tabIndex = one === next ? 0 : -1;
    next.focus();
  }

  function strip(n, at, largest) {
    let path = "";
    for (const [position, value] of at) path += `M${position + 0.5} 12V${(12 - Math.max(1, 11 * Math.min(1, value / largest))).toFixed(1)}`;
    return make("svg:svg", { viewBox: `0 0 ${n} 12`, preserveAspectRatio: "none", class: "strip", "aria-hidden": "true" },
      make("svg:path", { d: `M0 12H${n}`, class: "base" }), make("svg:path", { d: path, class: "bars" }));
  }

  // ---- Begin
  const fromHash = () => (/^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : null);

  document.addEventListener("DOMContentLoaded", () => {
    if (!data.index) { by("feature").textContent = "data/index.js is missing: the report's folder is not whole."; return; }
    for (const term of document.querySelectorAll("[data-measure]")) labels[term.dataset.measure] = term.textContent;
    data.index.latents.forEach((latent, i) => { place[latent] = i; });
    for (const id of ["search", "promoted"]) by(id)?.addEventListener("input", list);
    by("filters").addEventListener("input", list);
    by("sort").addEventListener("change", list);
    by("order").addEventListener("click", () => { setOrder(by("order").getAttribute("aria-pressed") !== "true"); list(); });
    by("more").addEventListener("click", () => { limit += ROWS; draw(); });
    for (const button of document.querySelectorAll("[data-preset]")) button.addEventListener("click", () => usePreset(button.dataset.preset));
    document.addEventListener("keydown", (event) => {
      if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "/") { event.preventDefault(); by("search").focus(); }
      if (event.key === "j") step(1);
      if (event.key === "k") step(-1);
    });
    addEventListener("hashchange", () => { if (fromHash() !== null) open(fromHash()); });
    list();
    if (fromHash() !== null) open(fromHash());
    else if (shown.length) open(data.index.latents[shown[0]]);
    else by("feature").textContent = "No latent of this SAE fires on these tokens.";
  });
})();

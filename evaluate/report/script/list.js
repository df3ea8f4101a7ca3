"use strict";
// The list of latents: search, filters, order, all of it in the URL.
(function () {
  const { by, make, number, chip, state, data, notes } = tcsae;
  const ROWS = 60;
  const labels = {};
  let shown = [], limit = ROWS, matching = new Set(), written = null;

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
  const filters = () => document.querySelectorAll("[data-filter]");
  const keyOf = (input) => `${input.dataset.filter}.${input.dataset.end === "0" ? "min" : "max"}`;

  function usePreset(name) {
    const preset = PRESETS[name]();
    for (const input of filters()) input.value = (preset.filters[input.dataset.filter] || [])[input.dataset.end] ?? "";
    if (!name) { by("search").value = ""; by("noted").value = ""; }
    by("sort").value = preset.sort;
    setOrder(true);
    by("filters").open = Boolean(name);
    press(name);
    list();
    write();
  }

  function press(name) {
    for (const button of document.querySelectorAll("[data-preset]")) {
      button.setAttribute("aria-pressed", String(Boolean(name) && button.dataset.preset === name));
    }
  }

  function setOrder(descending) {
    by("order").setAttribute("aria-pressed", String(descending));
    by("order").textContent = descending ? "largest first" : "smallest first";
  }
  const descending = () => by("order").getAttribute("aria-pressed") === "true";

  // The controls to the URL and back.
  function write() {
    const changes = { q: by("search").value.trim(), promoted: by("promoted")?.checked ? 1 : null, noted: by("noted").value,
      sort: by("sort").value === "rho_8_within" ? null : by("sort").value, order: descending() ? null : "smallest" };
    for (const input of filters()) changes[keyOf(input)] = input.value;
    state.replace(changes);
    written = asked();
    draw(); // its links hold the rest of the state
  }

  // What the URL says of the list alone.
  function asked() {
    const parameters = state.read();
    for (const key of ["latent", "context"]) parameters.delete(key);
    return String(parameters);
  }

  function read() {
    if (asked() === written) return; // a latent was chosen: the list stays, and with it the focus
    written = asked();
    const parameters = state.read();
    by("search").value = parameters.get("q") ?? "";
    if (by("promoted")) by("promoted").checked = parameters.has("promoted");
    for (const input of filters()) input.value = parameters.get(keyOf(input)) ?? "";
    if ([...filters()].some((input) => input.value !== "")) by("filters").open = true;
    const sort = parameters.get("sort");
    by("sort").value = sort && (sort === "latent" || data.index.columns[sort]) ? sort : "rho_8_within";
    setOrder(parameters.get("order") !== "smallest");
    const noted = parameters.get("noted") ?? "";
    offerNotes(noted);
    by("noted").value = noted;
    list();
  }

  // What the notes can be filtered by: any label, a tag, a list.
  function offerNotes(chosen = by("noted").value) {
    const { tags, lists } = notes.tagsOf(data.index.weights);
    const options = [["", "all latents"], ["label", "with a note"], ...tags.map((tag) => [`tag:${tag}`, `tag ${tag}`]), ...lists.map((one) => [`list:${one}`, `list ${one}`])];
    if (chosen && !options.some(([value]) => value === chosen)) options.push([chosen, chosen.replace(":", " ")]);
    by("noted").replaceChildren(...options.map(([value, name]) => make("option", { value }, name)));
    by("noted").value = chosen;
  }

  function byNote() {
    const [kind, wanted] = by("noted").value.split(/:(.*)/s);
    if (!kind) return () => true;
    return (i) => {
      const note = notes.of(data.index.weights, data.index.latents[i]);
      return Boolean(note) && (kind === "label" || note[kind === "tag" ? "tags" : "lists"].includes(wanted));
    };
  }

  function searched(asked) {
    matching = new Set();
    if (!asked) return () => true;
    for (const [token, one] of Object.entries(data.vocabulary)) if (one.toLowerCase().includes(asked)) matching.add(Number(token));
    const promoted = by("promoted")?.checked && data.index.promotes;
    return (i) => String(data.index.latents[i]) === asked || data.index.fires[i].some((token) => matching.has(token))
      || Boolean(promoted && promoted[i].some((token) => matching.has(token)))
      || Boolean(notes.of(data.index.weights, data.index.latents[i])?.label.toLowerCase().includes(asked));
  }

  function list() {
    const asked = by("search").value.trim().toLowerCase();
    const tests = [searched(asked), byNote()];
    for (const input of filters()) {
      if (input.value === "" || !Number.isFinite(input.valueAsNumber)) continue;
      const values = column(input.dataset.filter), bound = input.valueAsNumber, sign = input.dataset.end === "0" ? 1 : -1;
      tests.push((i) => values[i] !== null && sign * (values[i] - bound) >= 0);
    }
    const values = column(by("sort").value), sign = descending() ? -1 : 1;
    const first = (i) => String(data.index.latents[i]) === asked; // a number is that latent, before all that fire on it
    shown = data.index.latents.map((_, i) => i).filter((i) => tests.every((test) => test(i)));
    shown.sort((a, b) => first(b) - first(a) || (values[a] === null) - (values[b] === null) || sign * (values[a] - values[b]) || a - b);
    limit = ROWS;
    draw();
  }

  function draw() {
    const sort = by("sort").value;
    by("list").replaceChildren(...shown.slice(0, limit).map((i) => row(i, sort)));
    by("more").hidden = shown.length <= limit;
    by("count").textContent = `${shown.length.toLocaleString("en")} of ${data.index.latents.length.toLocaleString("en")} live latents`;
    by("sorted-by").textContent = sort === "latent" ? "density" : labels[sort];
    mark(Number(by("feature").dataset.latent ?? -1));
  }

  function row(i, sort) {
    const latent = data.index.latents[i];
    const fires = data.index.fires[i];
    const sorted = matching.size ? [...fires.filter((token) => matching.has(token)), ...fires.filter((token) => !matching.has(token))] : fires;
    const label = notes.of(data.index.weights, latent)?.label;
    return make("li", {}, make("a", { href: state.with({ latent }), "data-number": latent },
      make("span", { class: "id" }, String(latent)),
      make("span", { class: "chips" }, ...(label ? [make("span", { class: "label" }, label), " "] : []), ...sorted.slice(0, 4).map((token) => chip(token, matching.has(token)))),
      make("span", { class: "value" }, number(column(sort === "latent" ? "density" : sort)[i]))));
  }

  function mark(latent) {
    for (const link of by("list").querySelectorAll("a")) {
      if (Number(link.dataset.number) === latent) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    }
  }

  function start(onFound) {
    for (const term of document.querySelectorAll("[data-measure]")) labels[term.dataset.measure] = term.textContent;
    let waiting = null;
    const changed = () => { list(); write(); };
    by("search").addEventListener("input", () => {
      changed();
      clearTimeout(waiting);
      const before = state.read().get("latent");
      waiting = setTimeout(() => { // unless another one was chosen since
        if (by("search").value.trim() && shown.length && state.read().get("latent") === before) onFound(data.index.latents[shown[0]]);
      }, 120);
    });
    by("promoted")?.addEventListener("input", changed);
    by("noted").addEventListener("change", changed);
    by("filters").addEventListener("input", () => { press(null); changed(); });
    by("sort").addEventListener("change", changed);
    by("order").addEventListener("click", () => { setOrder(!descending()); changed(); });
    by("more").addEventListener("click", () => { limit += ROWS; draw(); });
    for (const button of document.querySelectorAll("[data-preset]")) button.addEventListener("click", () => usePreset(button.dataset.preset));
    notes.onChange(() => { offerNotes(); list(); });
    read();
  }

  tcsae.list = { start, read, list, mark, labels, column, shown: () => shown };
})();

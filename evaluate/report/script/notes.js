"use strict";
// Notes on latents: a label, tags and lists each, kept in the browser by the digest of the SAE's weights, so that they
// outlive the report. Wherever a page names a latent, as [data-latent] with [data-weights] on it or above, its label
// stands behind it.
(function () {
  const { make, save } = tcsae;
  const KEY = "tcsae-notes", FORMAT = "tcsae-notes", VERSION = 1;
  const DELPHI = /_latent(\d+)\.(?:txt|json)$/;
  const listeners = [];

  function all() {
    try { return JSON.parse(localStorage.getItem(KEY)) || {}; } catch { return {}; }
  }
  let runs = all();

  function keep() {
    try { localStorage.setItem(KEY, JSON.stringify(runs)); } catch { /* not kept, then */ }
    changed();
  }

  function changed() {
    for (const one of listeners) one();
    show(document);
  }

  const of = (weights, latent) => runs[weights]?.latents?.[latent];
  const words = (value) => [...new Set(String(value).split(",").map((one) => one.trim()).filter(Boolean))];

  function clean(note) {
    const held = note && typeof note === "object" ? note : { label: note };
    const list = (value) => words(Array.isArray(value) ? value.join(",") : value ?? "");
    return { label: String(held.label ?? "").trim(), tags: list(held.tags), lists: list(held.lists) };
  }

  function put(weights, name, latent, note) {
    runs[weights] ??= { name, latents: {} };
    const held = clean(note);
    if (held.label || held.tags.length || held.lists.length) runs[weights].latents[latent] = held;
    else delete runs[weights].latents[latent];
  }

  function set(weights, name, latent, note) {
    put(weights, name, latent, note);
    keep();
  }

  const exported = () => JSON.stringify({ format: FORMAT, version: VERSION, runs }, null, 1);

  // Files of three kinds: ours; delphi's explanations, one file a latent (layers.5_latent12.txt, a JSON string); one
  // object of latents, {"12": "label"}, or a list of {"latent" or "index", "label" or "description"}.
  async function take(files, weights, name) {
    let n = 0;
    const add = (into, called, latent, note) => { if (/^\d+$/.test(latent)) { put(into, called, Number(latent), note); n += 1; } };
    for (const file of files) {
      const content = await file.text();
      const match = DELPHI.exec(file.name);
      let value;
      try { value = JSON.parse(content); } catch {
        if (!match) throw new Error(`${file.name} is no JSON. Give notes exported here, or delphi's explanations.`);
        value = content;
      }
      if (match) add(weights, name, match[1], typeof value === "string" ? value : value.explanation ?? "");
      else if (value?.format === FORMAT) {
        if (value.version !== VERSION) throw new Error(`${file.name} has version ${value.version} of notes; this page reads ${VERSION}.`);
        for (const [digest, run] of Object.entries(value.runs)) for (const [latent, note] of Object.entries(run.latents)) add(digest, run.name, latent, note);
      } else if (Array.isArray(value)) {
        for (const one of value) add(weights, name, String(one.latent ?? one.index), one.label ?? one.description ?? one.explanation ?? "");
      } else if (value && typeof value === "object") {
        for (const [latent, note] of Object.entries(value)) add(weights, name, latent, note);
      }
    }
    keep();
    return n;
  }

  // The label behind every latent that is named below an element.
  function show(root) {
    for (const element of root.querySelectorAll("[data-latent]")) {
      const weights = element.closest("[data-weights]")?.dataset.weights;
      const label = weights ? of(weights, element.dataset.latent)?.label : "";
      const after = element.querySelector(":scope > .label");
      if (after) after.remove();
      if (label) element.append(make("span", { class: "label" }, label));
    }
  }

  function tagsOf(weights) {
    const found = { tags: new Set(), lists: new Set() };
    for (const note of Object.values(runs[weights]?.latents || {})) {
      for (const kind of ["tags", "lists"]) for (const one of note[kind]) found[kind].add(one);
    }
    return { tags: [...found.tags].sort(), lists: [...found.lists].sort() };
  }

  addEventListener("storage", (event) => { if (event.key === KEY) { runs = all(); changed(); } });
  document.addEventListener("DOMContentLoaded", () => show(document));
  tcsae.notes = {
    of, set, words, show, take, tagsOf,
    exported,
    saved: () => save("tcsae-notes.json", exported()),
    onChange: (listener) => listeners.push(listener),
  };
})();

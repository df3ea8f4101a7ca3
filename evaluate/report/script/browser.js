"use strict";
// The browser of features: what is open, the keys, and the URL.
(function () {
  const { by, make, load, state, data, list, notes, feature } = tcsae;
  const root = by("browser").dataset.root;
  let current = null;
  tcsae.place = {};

  async function open(latent) {
    const i = tcsae.place[latent];
    const box = by("feature");
    if (i === undefined) {
      box.replaceChildren(make("p", { class: "note" }, `Latent ${latent} is not among the live latents of this SAE.`));
      return;
    }
    current = latent;
    list.mark(latent);
    try {
      await load(`data/${Math.floor(latent / data.index.per_chunk)}.js`);
      const files = new Set(data.features[latent].contexts.map(([sequence]) => Math.floor(sequence / data.index.per_file)));
      await Promise.all(Array.from(files, (file) => load(`${root}sequences/${file}.js`)));
    } catch (error) {
      box.replaceChildren(make("p", { class: "warn" }, error.message));
      return;
    }
    if (current !== latent) return;
    document.title = `Latent ${latent} · ${data.index.run}`;
    box.replaceChildren(...feature.view(latent, i, step));
    box.dataset.latent = latent;
    list.mark(latent);
    notes.show(box);
  }

  function step(by_) {
    const shown = list.shown();
    const at = shown.indexOf(tcsae.place[current]) + by_;
    if (at >= 0 && at < shown.length) state.push({ latent: data.index.latents[shown[at]] });
  }

  function found(latent) { // by a search: no step of the history
    state.replace({ latent });
    open(latent);
  }

  function asked() {
    const latent = state.read().get("latent");
    return latent !== null && /^\d+$/.test(latent) ? Number(latent) : null;
  }

  function keys(event) {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = { "/": () => by("search").focus(), g: () => by("go").focus(), j: () => step(1), k: () => step(-1) }[event.key];
    if (act) { event.preventDefault(); act(); }
  }

  function importNotes() {
    const said = by("notes-said");
    by("notes-file").addEventListener("change", async (event) => {
      try {
        const n = await notes.take(event.target.files, data.index.weights, data.index.run);
        said.textContent = `${n} note${n === 1 ? "" : "s"} read`;
        if (current !== null) open(current);
      } catch (error) {
        said.textContent = error.message;
      }
      event.target.value = "";
    });
    by("notes-save").addEventListener("click", notes.saved);
  }

  document.addEventListener("DOMContentLoaded", () => {
    if (!data.index) { by("feature").textContent = "data/index.js is missing: the report's folder is not whole."; return; }
    data.index.latents.forEach((latent, i) => { tcsae.place[latent] = i; });
    list.terms = Object.fromEntries(Array.from(document.querySelectorAll("[data-measure]"), (term) => [term.dataset.measure, term.dataset.term]));
    list.start(found);
    importNotes();
    document.addEventListener("keydown", keys);
    by("go").addEventListener("change", () => { if (by("go").value !== "") { state.push({ latent: by("go").value }); by("go").value = ""; by("go").blur(); } });
    addEventListener("hashchange", () => {
      list.read();
      if (asked() !== null) open(asked());
    });
    const shown = list.shown();
    if (asked() !== null) open(asked());
    else if (shown.length) open(data.index.latents[shown[0]]);
    else by("feature").textContent = "No latent of this SAE fires on these tokens.";
  });
})();

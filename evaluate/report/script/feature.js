"use strict";
// One latent: its notes, measures, figures, tokens, likes and sequences.
(function () {
  const { by, make, number, chip, text, state, data, notes, charts, contexts, list } = tcsae;
  const AROUND = [["8", "8 tokens each side"], ["24", "24 tokens each side"], ["64", "64 tokens each side"], ["all", "whole sequence"]];

  const around = () => { const asked = state.read().get("context") ?? "24"; return asked === "all" ? 0 : Number(asked) || 24; };

  function view(latent, i, step) {
    const feature = data.features[latent];
    const largest = list.column("max")[i];
    const box = make("div", {}, contexts.columns(feature, largest, around()));
    return [heading(latent, i, step), noteForm(latent), summary(feature, i), toolbar(latent, i, feature, box, largest), box];
  }

  function heading(latent, i, step) {
    const group = data.index.group ? (data.index.group[i] === 0 ? "first group" : `group ${data.index.group[i] + 1}`) : "";
    const previous = make("button", { type: "button", title: "Previous of the list (k)" }, "‹ previous");
    const next = make("button", { type: "button", title: "Next of the list (j)" }, "next ›");
    previous.addEventListener("click", () => step(-1));
    next.addEventListener("click", () => step(1));
    const find = make("a", { href: "#search", class: "button find-link" }, "Find another");
    find.addEventListener("click", (event) => { event.preventDefault(); by("search").focus(); by("search").scrollIntoView({ block: "start" }); });
    // Served by `tcsae serve`, the live page lies above the report's root.
    const served = location.protocol.startsWith("http") && /\/report\/runs\//.test(location.pathname);
    const live = served ? [make("a", { href: `${by("browser").dataset.root}../#run=${encodeURIComponent(data.index.run)}&latent=${latent}`, class: "quiet" }, "on your text")] : [];
    return make("header", { class: "feature-head" },
      make("h2", {}, make("span", { "data-latent": latent }, `Latent ${latent}`), ...(group ? [" ", make("small", {}, group)] : [])),
      make("p", { class: "fires" }, "fires on ", ...data.index.fires[i].map((token) => chip(token))),
      make("div", { class: "steps" }, find, previous, next,
        make("a", { href: state.with({ latent }), class: "quiet" }, "link"), make("a", { href: `map.html#latent=${latent}`, class: "quiet" }, "on the map"), ...live));
  }

  // Label, tags and lists: kept as they are typed.
  function noteForm(latent) {
    const note = notes.of(data.index.weights, latent) || { label: "", tags: [], lists: [] };
    const field = (name, title, value, hint) => {
      const input = make("input", { id: `note-${name}`, value, placeholder: hint, autocomplete: "off" });
      return make("span", {}, make("label", { for: `note-${name}` }, title), input);
    };
    const form = make("form", { class: "note-form", "aria-label": `Notes on latent ${latent}` },
      field("label", "Label", note.label, "what it means"), field("tags", "Tags", note.tags.join(", "), "comma, separated"),
      field("lists", "Lists", note.lists.join(", "), "to check, …"));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", () => notes.set(data.index.weights, data.index.run, latent,
      { label: by("note-label").value, tags: by("note-tags").value, lists: by("note-lists").value }));
    return form;
  }

  function summary(feature, i) {
    const total = data.index.latents.length;
    const rows = Object.keys(list.labels).map((name) => {
      const value = list.column(name)[i];
      const below = value === null ? 0 : list.column(name).filter((other) => other !== null && other < value).length;
      const rank = Math.round((100 * below) / Math.max(1, total - 1));
      return make("tr", {}, make("th", { scope: "row" }, make("a", { class: "term", href: list.terms[name] }, list.labels[name])), make("td", { class: "n" }, number(value)),
        make("td", { class: "rank", title: `larger than ${rank}% of live latents` },
          make("span", { class: "meter" }, make("span", { style: `width:${value === null ? 0 : rank}%` })), value === null ? "" : `${rank}%`));
    });
    return make("div", { class: "summary" },
      make("table", { class: "measures" }, make("caption", {}, "Measures, and the share of live latents below"), make("tbody", {}, ...rows)),
      make("div", { class: "charts" }, ...figures(feature)),
      make("div", { class: "likes" }, ...likes(feature)));
  }

  function figures(feature) {
    const ofX = data.index.x_rho;
    const parts = [
      block("How large is it where it fires?", "ticks: the examples' quantiles; counts on a log scale", charts.activations(feature)),
      block("Does it persist?", `autocorrelation within documents${ofX ? "; dashed: x itself" : ""}; dotted: permuted`, charts.persistence(feature, ofX)),
    ];
    if (feature.logits) parts.splice(1, 0, block("Which logits does it move?", "all tokens by their change; counts on a log scale", charts.logits(feature)));
    return parts;
  }

  const block = (title, about, ...children) => make("div", { class: "pairs" }, make("h3", {}, title, " ", make("small", {}, about)), ...children);

  function likes(feature) {
    const parts = feature.up ? [lens("Promotes", feature.up), lens("Suppresses", feature.down)]
      : [make("p", { class: "note" }, `No logit lens. ${data.index.no_lens}`)];
    return [...parts, ...(feature.window ? [windowRows(feature.window)] : []),
      neighbours("Nearest", "cosine of decoder rows", feature.near), neighbours("Opposite", "cosine of decoder rows", feature.opposite),
      neighbours("Correlated", "activations", feature.correlated), neighbours("Fires at the same tokens", "Jaccard", feature.joint)];
  }

  function lens(title, pairs) {
    return block(title, "change of logit", make("p", {}, ...pairs.flatMap(([token, change]) =>
      [chip(token), make("small", {}, `${change > 0 ? "+" : "−"}${number(Math.abs(change))} `)])));
  }

  // A crosscoder's latent has a decoder row for each position of its window.
  function windowRows(rows) {
    const at = (i) => (i === rows.length - 1 ? "t" : `t − ${rows.length - 1 - i}`);
    const lines = rows.map(([share, cosine, tokens], i) => make("tr", {}, make("th", { scope: "row" }, at(i)),
      make("td", { class: "n" }, `${Math.round(100 * share)}%`), make("td", { class: "n" }, number(cosine)),
      make("td", {}, ...tokens.slice(0, 4).map((token) => chip(token)))));
    const head = ["position", "of its norm²", "cosine with t", "promotes"].map((name) => make("th", { scope: "col" }, name));
    const table = make("table", { class: "window-rows" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...lines));
    const rowsOf = block("At each position of the window", "its decoder rows", table);
    rowsOf.classList.add("whole-row");
    return rowsOf;
  }

  function neighbours(title, about, pairs) {
    const place = tcsae.place;
    const items = pairs.map(([latent, likeness]) => make("li", {}, tcsae.link(latent), " ",
      make("small", {}, number(likeness)), " ", ...(data.index.fires[place[latent]] || []).slice(0, 2).map((token) => chip(token))));
    return block(title, about, pairs.length ? make("ul", {}, ...items) : make("p", { class: "note" }, "none"));
  }

  // How much of each sequence is shown, and all of it as text.
  function toolbar(latent, i, feature, box, largest) {
    const select = make("select", { id: "context" }, ...AROUND.map(([value, name]) => make("option", { value }, name)));
    const asked = state.read().get("context") ?? "24";
    select.value = AROUND.some(([value]) => value === asked) ? asked : "24";
    select.addEventListener("change", () => {
      state.replace({ context: select.value === "24" ? null : select.value });
      box.replaceChildren(contexts.columns(feature, largest, around()));
    });
    const said = make("span", { class: "hint", role: "status" });
    const copy = make("button", { type: "button", id: "copy" }, "Copy as text");
    copy.addEventListener("click", async () => { await tcsae.copy(asText(latent, i, feature)); said.textContent = "copied"; });
    return make("div", { class: "toolbar" }, make("h3", {}, "Where does it fire?"), make("label", { for: "context" }, "Show"), select, copy, said);
  }

  function asText(latent, i, feature) {
    const note = notes.of(data.index.weights, latent);
    const pairs = (some) => some.map(([token, change]) => `${tcsae.visible(text(token))} ${number(change)}`).join("  ");
    const lines = [`Latent ${latent} of ${data.index.run}${note?.label ? `: ${note.label}` : ""}`,
      Object.keys(list.labels).map((name) => `${list.labels[name]} ${number(list.column(name)[i])}`).join(", "),
      `fires on: ${data.index.fires[i].map((token) => tcsae.visible(text(token))).join("  ")}`,
      ...(feature.up ? [`promotes: ${pairs(feature.up)}`, `suppresses: ${pairs(feature.down)}`] : []),
      "", ...feature.contexts.map((one) => contexts.asText(one, around()))];
    return lines.join("\n");
  }

  tcsae.feature = { view, asText };
})();

"use strict";
// The sequences in which a latent fires: the strongest, and one at each of some quantiles, beside each other.
(function () {
  const { make, number, ordinal, text, visible, data } = tcsae;

  // The part of a sequence that is shown: so many tokens on each side of the strongest; 0: all.
  function part(context, around) {
    const [sequence, , positions, values] = context;
    const tokens = data.sequences[sequence][2];
    const peak = positions[values.indexOf(Math.max(...values))];
    return around ? [Math.max(0, peak - around), Math.min(tokens.length, peak + around + 1)] : [0, tokens.length];
  }

  const title = (quantile) => quantile === null ? "Strongest" : `Around the ${ordinal(Math.round(100 * quantile))} percentile`;

  function columns(feature, largest, around) {
    const strongest = feature.contexts.filter(([, quantile]) => quantile === null);
    const others = feature.contexts.filter(([, quantile]) => quantile !== null);
    const column = (heading, about, some, titled) => make("section", { class: "contexts" },
      make("h3", {}, heading, " ", make("small", {}, about)), ...some.map((one) => article(one, largest, around, titled)));
    const parts = [column("Strongest sequences", "largest peaks first", strongest, false)];
    if (others.length) parts.push(column("Across its range", "a sequence at each quantile of the peaks", others, true));
    return make("div", { class: "side-by-side" }, ...parts);
  }

  function article(context, largest, around, titled) {
    const [sequence, quantile, positions, values] = context;
    const [document_, start, tokens] = data.sequences[sequence];
    const [first, stop] = part(context, around);
    const peak = Math.max(...values);
    const at = new Map(positions.map((position, k) => [position, values[k]]));
    const readout = make("output", { class: "readout" }, `peak ${number(peak)}`);
    const body = tokenLine(tokens, at, largest, [first, stop], start);
    const tell = (event) => { if (event.target.dataset?.told) readout.textContent = event.target.dataset.told; };
    body.addEventListener("mouseover", tell);
    body.addEventListener("focusin", tell);
    body.addEventListener("keydown", (event) => walk(event, body));
    const where = `document ${document_.toLocaleString("en")}, tokens ${(start + first).toLocaleString("en")} to ${(start + stop - 1).toLocaleString("en")}`;
    return make("article", { class: "context" },
      make("header", {}, make("span", {}, titled ? make("b", {}, title(quantile)) : "", titled ? " · " : "", where), readout),
      body, strip(first, stop, at, largest));
  }

  // Tokens as text; where the latent is active they are shaded, and the strongest is framed.
  function tokenLine(tokens, at, largest, [first, stop], start) {
    const body = make("p", { class: "tokens", dir: "ltr" }, ...(first ? [make("span", { class: "cut" }, "…")] : []));
    const peak = Math.max(...at.values());
    let reachable = true, framed = false;
    for (let position = first; position < stop; position += 1) {
      const token = tokens[position], value = at.get(position);
      if (value === undefined) { body.append(make("bdi", {}, text(token))); continue; }
      const share = Math.min(1, value / largest);
      const isPeak = value === peak && !framed;
      framed ||= isPeak;
      const span = make("bdi", {
        class: `on s${Math.min(4, 1 + Math.floor(share * 4))}${isPeak ? " peak" : ""}`, style: `--a:${(0.1 + 0.75 * share).toFixed(2)}`,
        tabindex: reachable ? "0" : "-1", title: `${number(value)}, position ${start + position}`,
      }, text(token));
      span.dataset.told = `${visible(text(token))}: ${number(value)}, position ${position} of the sequence`;
      reachable = false;
      body.append(span);
    }
    if (stop < tokens.length) body.append(make("span", { class: "cut" }, "…"));
    return body;
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

  function strip(first, stop, at, largest) {
    let path = "";
    for (const [position, value] of at) {
      if (position >= first && position < stop) path += `M${position - first + 0.5} 12V${(12 - Math.max(1, 11 * Math.min(1, value / largest))).toFixed(1)}`;
    }
    return make("svg:svg", { viewBox: `0 0 ${stop - first} 12`, preserveAspectRatio: "none", class: "strip", "aria-hidden": "true" },
      make("svg:path", { d: `M0 12H${stop - first}`, class: "base" }), make("svg:path", { d: path, class: "bars" }));
  }

  // Plain text, runs of active tokens in brackets: what the terminal shows.
  function asText(context, around) {
    const [sequence, quantile, positions, values] = context;
    const [document_, start, tokens] = data.sequences[sequence];
    const [first, stop] = part(context, around);
    const active = new Set(positions);
    let line = first ? "…" : "", was = false;
    for (let position = first; position < stop; position += 1) {
      const is = active.has(position);
      line += (is === was ? "" : is ? "⟦" : "⟧") + text(tokens[position]);
      was = is;
    }
    return `${title(quantile)}: peak ${number(Math.max(...values))}, document ${document_}, from token ${start + first}\n${line}${was ? "⟧" : ""}${stop < tokens.length ? "…" : ""}`;
  }

  tcsae.contexts = { columns, asText };
})();

"use strict";
// Small figures of one latent, as SVG in the page's colours, each with its figures in words.
(function () {
  const { make, number } = tcsae;
  const WIDTH = 320, LEFT = 34, RIGHT = 6;

  const label = (x, y, anchor, words) => make("svg:text", { x, y, "text-anchor": anchor }, words);
  const picture = (height, told, ...parts) => make("svg:svg", { viewBox: `0 0 ${WIDTH} ${height}`, class: "chart", role: "img", "aria-label": told }, ...parts);

  // Counts in equal bins from `low`; the height is logarithmic, since most activations are small.
  function bars(low, width, counts, marks, told, units) {
    const height = 104, base = height - 18, top = marks.length ? 22 : 8;
    const most = Math.max(1, ...counts), high = low + width * counts.length;
    const x = (value) => LEFT + ((value - low) / (high - low || 1)) * (WIDTH - LEFT - RIGHT);
    const y = (count) => base - (Math.log1p(count) / Math.log1p(most)) * (base - top);
    let path = "";
    counts.forEach((count, k) => {
      if (count) path += `M${x(low + k * width).toFixed(1)} ${base}V${y(count).toFixed(1)}H${(x(low + (k + 1) * width) - 0.6).toFixed(1)}V${base}Z`;
    });
    const parts = [make("svg:path", { d: path, class: "bars" }), make("svg:path", { d: `M${LEFT} ${base}H${WIDTH - RIGHT}`, class: "zero" }),
      label(LEFT - 4, y(most) + 4, "end", most.toLocaleString("en")), label(LEFT - 4, base, "end", "0"),
      label(LEFT, height - 4, "start", number(low)), label(WIDTH - RIGHT, height - 4, "end", number(high)),
      label((LEFT + WIDTH) / 2, height - 4, "middle", units)];
    let last = -Infinity;
    for (const [value, name] of marks) {
      const at = x(value);
      parts.push(make("svg:path", { d: `M${at.toFixed(1)} ${base}V${top - 6}`, class: "mark" }));
      if (at - last > 18) { parts.push(label(at, top - 9, "middle", name)); last = at; }
    }
    return picture(height, told, ...parts);
  }

  function activations(feature) {
    const [width, counts] = feature.histogram;
    const total = counts.reduce((sum, count) => sum + count, 0);
    const marks = feature.contexts.filter(([, quantile]) => quantile !== null)
      .map(([, quantile, , values]) => [Math.max(...values), `${Math.round(100 * quantile)}%`]).sort((a, b) => a[0] - b[0]);
    const told = `Histogram of ${total.toLocaleString("en")} activations from 0 to ${number(width * counts.length)}. `
      + `Peaks of the examples at quantiles: ${marks.map(([peak, name]) => `${name} ${number(peak)}`).join(", ") || "none"}`;
    return bars(0, width, counts, marks, told, "activation");
  }

  function logits(feature) {
    const [low, high, counts] = feature.logits;
    const told = `Histogram of the change of ${counts.reduce((sum, count) => sum + count, 0).toLocaleString("en")} tokens' logits, from ${number(low)} to ${number(high)}`;
    return bars(low, (high - low) / counts.length, counts, low < 0 && high > 0 ? [[0, "0"]] : [], told, "change of logit");
  }

  // Autocorrelation over lags: of the latent, of x itself where the evaluation has it, and of permuted positions.
  function persistence(feature, ofX) {
    const height = 104, bottom = 18;
    const known = [...feature.rho, ...(ofX || [])].filter((value) => value !== null); // null: no pair at that lag
    const high = Math.max(0.1, ...known), low = Math.min(0, ...known, feature.null ?? 0);
    const x = (lag) => LEFT + ((lag - 1) / Math.max(1, feature.rho.length - 1)) * (WIDTH - LEFT - RIGHT);
    const y = (value) => 8 + ((high - value) / (high - low)) * (height - bottom - 12);
    const path = (values) => values.map((value, k) => value === null ? "" :
      `${k && values[k - 1] !== null ? "L" : "M"}${x(k + 1).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const level = (value, name) => make("svg:path", { d: `M${LEFT} ${y(value)}H${WIDTH - RIGHT}`, class: name });
    const lag8 = (values) => `${number(values[0])} at lag 1, ${number(values[7])} at lag 8`;
    const told = `Autocorrelation ${lag8(feature.rho)}; with positions permuted ${number(feature.null)}${ofX ? `; of x itself ${lag8(ofX)}` : ""}`;
    return picture(height, told, level(0, "zero"), ...(feature.null === null ? [] : [level(feature.null, "null")]),
      ...(ofX ? [make("svg:path", { d: path(ofX.slice(0, feature.rho.length)), class: "of-x" })] : []),
      make("svg:path", { d: path(feature.rho), class: "curve" }),
      label(LEFT - 4, y(high) + 4, "end", number(high)), label(LEFT - 4, y(0) + 3, "end", "0"),
      label(x(1), height - 4, "start", "lag 1"), label(x(feature.rho.length), height - 4, "end", String(feature.rho.length)));
  }

  tcsae.charts = { activations, logits, persistence, bars };
})();

"use strict";
// Light or dark as the system says, until the button says otherwise. In the head, so that no page flashes.
(function () {
  const root = document.documentElement;
  const kept = (() => { try { return localStorage.getItem("tcsae-theme"); } catch { return null; } })();
  if (kept) root.dataset.theme = kept;
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      try { localStorage.setItem("tcsae-theme", root.dataset.theme); } catch { /* not kept, then */ }
    });
  });
})();

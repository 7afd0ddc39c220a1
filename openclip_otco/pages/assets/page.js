"use strict";

// Light and dark: the system's choice until the button is used, which is remembered where the browser lets a file do so.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const recall = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const keep = (theme) => { try { localStorage.setItem("theme", theme); } catch { /* for this visit only */ } };
  const chosen = () => root.dataset.theme || (system.matches ? "dark" : "light");
  const show = () => {
    button.textContent = chosen() === "dark" ? "☀ Light" : "☾ Dark";
    button.setAttribute("aria-pressed", String(chosen() === "dark"));
    button.setAttribute("aria-label", "Dark page");
  };
  if (["light", "dark"].includes(recall())) root.dataset.theme = recall();
  button.addEventListener("click", () => {
    root.dataset.theme = chosen() === "dark" ? "light" : "dark";
    keep(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
})();

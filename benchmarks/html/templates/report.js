"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const say = () => {
    button.setAttribute("aria-pressed", String(dark()));
    button.title = dark() ? "Show in light colours" : "Show in dark colours";
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    say();
  });
  system.addEventListener("change", say);
  say();

  // Pictures open in a dialog, the reference under the picture, with a slider between the two.
  const dialog = document.getElementById("viewer");
  const at = (name) => dialog.querySelector("[data-" + name + "]");
  const slider = at("slider");
  const wipe = () => at("top").style.setProperty("--cut", slider.value + "%");
  slider.addEventListener("input", wipe);
  for (const opener of document.querySelectorAll("button[data-view]")) {
    opener.disabled = false;
    opener.addEventListener("click", () => {
      const cell = opener.closest("figure");
      const own = cell.querySelector("img[data-own]");
      const reference = cell.dataset.reference && document.getElementById(cell.dataset.reference);
      at("title").textContent = cell.dataset.title;
      at("caption").textContent = cell.dataset.caption;
      at("top").src = own.src;
      at("top").alt = own.alt;
      at("below").src = (reference || own).src;
      at("tools").hidden = !reference;
      slider.value = reference ? 50 : 100;
      wipe();
      dialog.showModal();
    });
  }
  at("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });

  // Paper cannot be opened.
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
})();

// Light, dark or as the system. Not a module: it runs before the first paint, so that no page flashes.
(() => {
  const sheet = document.getElementById("dark");
  const media = { system: "(prefers-color-scheme: dark)", light: "not all", dark: "all" };
  const next = { system: "light", light: "dark", dark: "system" };
  const words = { system: "as the system", light: "light", dark: "dark" };
  const now = () => (localStorage.theme in media ? localStorage.theme : "system");

  function show() {
    sheet.media = media[now()];
    document.documentElement.dataset.theme = now();
    const button = document.querySelector("[data-theme-switch]");
    button?.setAttribute("aria-label", `Colours: ${words[now()]}`);
    button?.setAttribute("title", `colours: ${words[now()]}; click for ${words[next[now()]]} (d)`);
  }
  window.switchTheme = () => {
    localStorage.theme = next[now()];
    show();
    dispatchEvent(new Event("theme"));
  };
  addEventListener("storage", show);
  addEventListener("DOMContentLoaded", show);
  show();
})();

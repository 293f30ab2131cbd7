// What a token's activation is: beside the pointer, under a finger, or with the arrow keys inside an example.

const marks = ".window mark[title], .window mark[data-tip], .window .looked[title], .window .looked[data-tip]";
let tip;
let spoken;

function show(mark) {
  tip?.remove();
  tip = undefined;
  if (!mark) return;
  if (mark.title) {
    mark.dataset.tip = mark.title;
    mark.removeAttribute("title");
  }
  tip = document.createElement("div");
  tip.className = "tip";
  tip.textContent = mark.dataset.tip;
  document.body.append(tip);
  const box = mark.getClientRects()[0];
  const room = document.documentElement.clientWidth - tip.offsetWidth - 4;
  tip.style.left = `${Math.max(4, Math.min(box.left + scrollX, room))}px`;
  tip.style.top = `${box.top + scrollY - tip.offsetHeight - 4}px`;
}

function say(mark) {
  if (!spoken) {
    spoken = document.createElement("div");
    spoken.className = "unseen";
    spoken.setAttribute("role", "status");
    document.body.append(spoken);
  }
  spoken.textContent = `${mark.textContent.trim()}: ${mark.dataset.tip}`;
}

function at(window) {
  return window.querySelector("mark.at, .looked.at");
}

function goTo(window, mark) {
  at(window)?.classList.remove("at");
  mark.classList.add("at");
  show(mark);
  say(mark);
}

document.addEventListener("pointerover", (event) => show(event.target.closest?.(marks)));
document.addEventListener("click", (event) => show(event.target.closest?.(marks)));
document.addEventListener("focusin", (event) => {
  if (!event.target.matches?.(".window[tabindex]")) return;
  const found = event.target.querySelector("mark.peak, .looked") ?? event.target.querySelector("mark");
  if (found) goTo(event.target, found);
});
document.addEventListener("focusout", (event) => {
  if (!event.target.matches?.(".window[tabindex]")) return;
  at(event.target)?.classList.remove("at");
  show();
});
document.addEventListener(
  "keydown",
  (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const here = document.activeElement;
    if (!step || !here?.matches(".window[tabindex]")) return;
    // In an example the arrows belong to its tokens, not to the features.
    event.preventDefault();
    const all = [...here.querySelectorAll(marks)];
    goTo(here, all[Math.max(0, Math.min(all.length - 1, all.indexOf(at(here)) + step))]);
  },
  true,
);

// The pointer may have come to rest on a token before this script was there.
show([...document.querySelectorAll(marks)].find((mark) => mark.matches(":hover")));

export function mount() {
  document.querySelectorAll(".window:not(.tokens, [tabindex])").forEach((window) => {
    if (!window.querySelector(marks)) return;
    window.tabIndex = 0;
    window.setAttribute("role", "group");
    window.setAttribute("aria-label", "Text; arrow keys go from active token to active token");
  });
}

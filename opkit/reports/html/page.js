"use strict";
// What every page shares: light, dark or the system's choice; a tip for marks under the pointer or
// with the focus (above a mark with data-up); arrow keys within a group of marks, so that a chart is
// one stop of the Tab key.
const opkit = (() => {
  const tip = document.getElementById("tip");

  function place(mark) {
    const box = mark.getBoundingClientRect();
    tip.style.visibility = box.bottom < 0 || box.top > innerHeight ? "hidden" : "";
    const left = Math.min(Math.max(box.left, 8), innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + 6;
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(left, 8)}px`;
    const up = mark.dataset.up !== undefined || below + tip.offsetHeight > innerHeight;
    tip.style.top = `${up && above > 0 ? above : below}px`;
  }

  let shown = null;
  function hide() {
    shown = null;
    tip.hidden = true;
  }

  function show(mark) {
    shown = mark;
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    place(mark);
  }

  const markOf = (event) => event.target.closest?.(".mark");
  for (const [name, wanted] of [["pointerover", true], ["focusin", true], ["pointerout", false], ["focusout", false]]) {
    document.addEventListener(name, (event) => {
      const mark = markOf(event);
      if (wanted && mark) show(mark);
      else if (!wanted) hide();
    });
  }
  // The focus may scroll its mark into view: the tip follows it, and is unseen while the mark is.
  document.addEventListener("scroll", () => { if (shown) place(shown); }, true);

  function focus(mark, group) {
    for (const other of group.querySelectorAll('.mark[tabindex="0"]')) other.setAttribute("tabindex", "-1");
    mark.setAttribute("tabindex", "0");
    mark.focus();
  }

  document.addEventListener("keydown", (event) => {
    const mark = markOf(event);
    if (event.key === "Escape") hide();
    const group = mark?.closest("[data-roving]");
    if (!group) return;
    const marks = [...group.querySelectorAll(".mark")];
    const at = marks.indexOf(mark);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: marks.length - 1 }[event.key];
    if (next === undefined || !marks[next]) return;
    event.preventDefault();
    focus(marks[next], group);
  });

  // A chart's marks: one of them is a stop of the Tab key.
  for (const chart of document.querySelectorAll("svg[data-roving]")) {
    chart.querySelectorAll(".mark").forEach((mark, at) => {
      mark.setAttribute("role", "img");
      mark.setAttribute("tabindex", at ? "-1" : "0");
    });
  }

  const button = document.getElementById("theme");
  const schemes = { auto: "light dark", light: "light", dark: "dark" };
  button.hidden = false;
  button.addEventListener("click", () => {
    const names = Object.keys(schemes);
    const now = names[(names.indexOf(button.dataset.theme ?? "auto") + 1) % names.length];
    button.dataset.theme = now;
    button.textContent = `theme: ${now}`;
    document.documentElement.style.colorScheme = schemes[now];
  });

  // Paper shows what is open on the screen, and nothing is folded away.
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.open = true;
      details.dataset.folded = "";
    }
  });
  addEventListener("afterprint", () => {
    for (const details of document.querySelectorAll("details[data-folded]")) {
      details.open = false;
      delete details.dataset.folded;
    }
  });

  return { show, focus };
})();

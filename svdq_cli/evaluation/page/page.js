"use strict";

// The divider of a pair follows its slider, by mouse, touch or arrow keys.
for (const slider of document.querySelectorAll(".pair input[type=range]")) {
  const view = slider.closest(".view");
  const follow = () => view.style.setProperty("--split", slider.value + "%");
  slider.addEventListener("input", follow);
  follow();
}

// A section's choices: what the 16-bit image is compared with, whether images or difference maps are shown, how large.
for (const gallery of document.querySelectorAll(".gallery")) {
  const choices = [...gallery.querySelectorAll(".choices input")];
  const show = () => {
    const chosen = {};
    for (const choice of choices) if (choice.checked) chosen[choice.dataset.choice] = choice.value;
    gallery.classList.toggle("maps", chosen.view === "differences");
    gallery.classList.toggle("sized", chosen.size !== "fit");
    for (const view of gallery.querySelectorAll(".view")) {
      view.style.width = chosen.size === "fit" ? "" : chosen.size * view.dataset.width + "px";
    }
    for (const part of gallery.querySelectorAll("[data-way]")) {
      const kind = part.dataset.kind;
      part.hidden = part.dataset.way !== chosen.way || (kind !== undefined && kind !== chosen.view);
    }
  };
  for (const choice of choices) choice.addEventListener("change", show);
  show();
}

// What is wider than its box says that one can scroll.
const boxes = [...document.querySelectorAll(".wide")];
const tell = () => {
  for (const box of boxes) box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth + 1);
};
for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", tell);
window.addEventListener("resize", tell);
tell();

"use strict";

// The divider of a pair follows its slider, by mouse, touch or arrow keys.
for (const slider of document.querySelectorAll(".pair input[type=range]")) {
  const view = slider.closest(".view");
  const follow = () => view.style.setProperty("--split", slider.value + "%");
  slider.addEventListener("input", follow);
  follow();
}

// A chapter's choices: what the 16-bit picture is compared with, and whether pictures or difference maps are shown.
for (const gallery of document.querySelectorAll(".gallery")) {
  const choices = [...gallery.querySelectorAll(".choices input")];
  const show = () => {
    const chosen = {};
    for (const choice of choices) if (choice.checked) chosen[choice.dataset.choice] = choice.value;
    gallery.classList.toggle("maps", chosen.view === "differences");
    for (const part of gallery.querySelectorAll("[data-way]")) {
      const kind = part.dataset.kind;
      part.hidden = part.dataset.way !== chosen.way || (kind !== undefined && kind !== chosen.view);
    }
  };
  for (const choice of choices) choice.addEventListener("change", show);
  show();
}

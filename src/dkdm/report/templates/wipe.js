"use strict";
// Pairs of images become one image each, which a slider wipes between; without it they stay pairs.
for (const wipe of document.querySelectorAll(".wipe")) {
  const range = wipe.querySelector("input[type=range]");
  const show = (value) => {
    range.value = value;
    wipe.style.setProperty("--cut", range.value + "%");
    const first = Math.round(range.value);
    const { first: left, second: right } = wipe.dataset;
    range.setAttribute("aria-valuetext", `${left} ${first} %, ${right} ${100 - first} %`);
  };
  range.addEventListener("input", () => show(range.value));
  for (const button of wipe.querySelectorAll("button[value]")) {
    button.addEventListener("click", () => show(button.value));
  }
  for (const box of wipe.querySelectorAll(".box")) {
    const follow = (event) => {
      const { left, width } = box.getBoundingClientRect();
      show((100 * (event.clientX - left)) / width);
    };
    box.addEventListener("pointerdown", (event) => {
      box.setPointerCapture(event.pointerId);
      follow(event);
    });
    box.addEventListener("pointermove", (event) => {
      if (box.hasPointerCapture(event.pointerId)) follow(event);
    });
  }
  wipe.classList.add("live");
  show(50);
}

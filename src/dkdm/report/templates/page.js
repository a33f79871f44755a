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

// A tap on a chart, or the arrow keys in it, show the value of a mark, as a mouse does by hovering.
const tip = document.createElement("output");
tip.className = "tip";
document.body.append(tip);
let chosen = null;
const choose = (mark) => {
  chosen?.classList.remove("chosen");
  chosen = mark;
  tip.hidden = !mark;
  if (!mark) return;
  mark.classList.add("chosen");
  tip.textContent = mark.querySelector("title").textContent;
  const place = mark.getBoundingClientRect();
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  const left = place.left + (place.width - tip.offsetWidth) / 2;
  tip.style.left = `${scrollX + Math.max(8, Math.min(left, room))}px`;
  tip.style.top = `${scrollY + place.top - tip.offsetHeight - 8}px`;
};
choose(null);
for (const chart of document.querySelectorAll("svg.chart")) {
  const marks = [...chart.querySelectorAll("circle, rect")].filter((each) => each.querySelector("title"));
  if (!marks.length) continue;
  const apart = (mark, x, y) => {
    const { left, right, top, bottom } = mark.getBoundingClientRect();
    return Math.hypot(Math.max(left - x, 0, x - right), Math.max(top - y, 0, y - bottom));
  };
  chart.addEventListener("click", ({ clientX, clientY }) => {
    const found = marks.map((mark) => apart(mark, clientX, clientY));
    choose(marks[found.indexOf(Math.min(...found))]);
  });
  chart.setAttribute("tabindex", "0");
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (event.key === "Escape") choose(null);
    if (!step) return;
    event.preventDefault();
    const last = marks.indexOf(chosen);
    choose(marks[last < 0 ? 0 : (last + step + marks.length) % marks.length]);
  });
  chart.addEventListener("blur", () => choose(null));
}
document.addEventListener("click", ({ target }) => {
  if (!target.closest("svg.chart")) choose(null);
});

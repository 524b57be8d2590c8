// Sliders that show one of several pictures, all of which are in the page.
"use strict";

for (const slider of document.querySelectorAll(".frames input[type=range]")) {
  const frames = [...slider.closest(".frames").children].filter((child) => child.classList.contains("frame"));
  const output = slider.closest(".control").querySelector("output");
  slider.addEventListener("input", () => {
    frames.forEach((frame, index) => { frame.hidden = index !== Number(slider.value); });
    output.value = frames[slider.value].dataset.value;
    slider.setAttribute("aria-valuetext", output.value);
  });
}

for (const button of document.querySelectorAll("button[data-play]")) {
  const slider = document.getElementById(button.dataset.play);
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
    button.setAttribute("aria-pressed", "false");
  };
  const step = () => {
    if (slider.value === slider.max) return stop();
    slider.value = Number(slider.value) + 1;
    slider.dispatchEvent(new Event("input"));
  };
  button.addEventListener("click", () => {
    if (timer) return stop();
    button.textContent = "Stop";
    button.setAttribute("aria-pressed", "true");
    timer = setInterval(step, 900);
    if (slider.value !== slider.max) return step();
    slider.value = slider.min;
    slider.dispatchEvent(new Event("input"));
  });
}

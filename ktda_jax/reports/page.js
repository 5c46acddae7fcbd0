"use strict";

// Tables: a click on a head sorts by it, a second one the other way round. Empty keys (no value) stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows];
    const numeric = rows.every((row) => key(row) === "" || Number.isFinite(Number(key(row))));
    const before = head.getAttribute("aria-sort");
    // Numbers begin with the largest, names with A.
    const down = before ? before === "ascending" : numeric;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? x - y : x.localeCompare(y);
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}

// Charts: the values at the step nearest to the pointer, or one step after the other by the arrow keys.
for (const svg of document.querySelectorAll("svg[data-lines]")) {
  const chart = JSON.parse(svg.dataset.lines);
  const cursor = svg.querySelector(".cursor");
  const readout = svg.parentElement.querySelector(".readout");
  const all = [...new Set(chart.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  let current = null;
  const show = (wanted) => {
    const found = chart.lines.map(({ name, steps, values }) => {
      let best = 0;
      steps.forEach((step, k) => { if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = k; });
      return { name, step: steps[best], value: values[best] };
    });
    const nearest = found.reduce((a, b) => Math.abs(b.step - wanted) < Math.abs(a.step - wanted) ? b : a);
    const at = chart.left + (nearest.step - chart.first) / (chart.last - chart.first) * (chart.right - chart.left);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    const told = found.map(({ name, step, value }) => `${name} ${value}${step === nearest.step ? "" : ` (step ${step})`}`);
    readout.textContent = `step ${nearest.step}: ${told.join(", ")}`;
    current = nearest.step;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.width;
    const share = Math.min(1, Math.max(0, (x - chart.left) / (chart.right - chart.left)));
    show(chart.first + share * (chart.last - chart.first));
  });
  svg.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    const before = current === null ? (way > 0 ? -1 : all.length) : all.indexOf(current);
    show(all[Math.min(all.length - 1, Math.max(0, before + way))]);
  });
  for (const leaving of ["pointerleave", "blur"]) {
    svg.addEventListener(leaving, () => {
      cursor.setAttribute("visibility", "hidden");
      readout.textContent = "";
      current = null;
    });
  }
}

// Tiles: layers on and off, classes half transparent over the image, label and prediction in turn.
const tiles = document.getElementById("tiles");
for (const tile of tiles.querySelectorAll(".tile")) {
  const source = (layer) => tile.querySelector(`.panel[data-layer="${layer}"] .top`).src;
  const under = (frame, kind, layer) => {
    const picture = document.createElement("img");
    picture.className = kind;
    picture.alt = "";
    picture.src = source(layer);
    frame.prepend(picture);
  };
  for (const panel of tile.querySelectorAll('.panel[data-layer="label"], .panel[data-layer="prediction"]')) {
    const frame = panel.querySelector(".frame");
    if (panel.dataset.layer === "prediction") {
      under(frame, "truth", "label");
      const badge = frame.appendChild(document.createElement("b"));
      badge.className = "badge";
      badge.textContent = "label";
    }
    under(frame, "base", "image");
  }
}
for (const box of tiles.querySelectorAll("input[data-layer]")) {
  const apply = () => tiles.classList.toggle(`hide-${box.dataset.layer}`, !box.checked);
  box.addEventListener("change", apply);
  apply(); // the browser may remember a box from before a reload
}
const opacity = tiles.querySelector("input[data-opacity]");
if (opacity) {
  const apply = () => tiles.style.setProperty("--opacity", opacity.value / 100);
  opacity.addEventListener("input", apply);
  apply();
}
const blink = tiles.querySelector("input[data-blink]");
if (blink) {
  let timer = null;
  const apply = () => {
    clearInterval(timer);
    tiles.classList.toggle("swapped", blink.checked);
    if (blink.checked) timer = setInterval(() => tiles.classList.toggle("swapped"), 800);
  };
  blink.addEventListener("change", apply);
  apply();
}

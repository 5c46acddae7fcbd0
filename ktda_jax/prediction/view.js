"use strict";

// The map is a canvas. Positions are in pixels of the finest level, `scale` is CSS pixels per such pixel.
const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("map");
const context = canvas.getContext("2d");
const readout = document.querySelector(".readout");
const legend = [...document.querySelectorAll("tbody tr")];
const { levels, tile: TILE } = data;
const finest = levels[0];
const view = { x: 0, y: 0, scale: 1 };
let layer = "map", opacity = 0.55, fitted = true, frame = null, waiting = null;

// Pictures that were decoded, the longest unused first; the coarsest level, one picture of each layer, stays.
const KEPT = 256;
const decoded = new Map();
function picture(name, level, index) {
  const key = `${name} ${level} ${index}`;
  let found = decoded.get(key);
  if (found) {
    decoded.delete(key);
  } else {
    found = new Image();
    found.onload = draw;
    found.src = levels[level].tiles[name][index];
    if (decoded.size > KEPT) {
      decoded.delete([...decoded.keys()].find((old) => !old.includes(` ${levels.length - 1} `)));
    }
  }
  decoded.set(key, found);
  return found.complete && found.naturalWidth ? found : null;
}

const columns = (level) => Math.ceil(levels[level].width / TILE);

function draw() {
  frame ??= requestAnimationFrame(paint);
}

function paint() {
  frame = null;
  const ratio = window.devicePixelRatio || 1;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.globalAlpha = 1;
  context.clearRect(0, 0, canvas.width, canvas.height);
  const shown = view.scale * ratio; // device pixels per pixel of the finest level
  const level = Math.min(Math.max(Math.floor(-Math.log2(shown) + 0.25), 0), levels.length - 1);
  paintLayer("scene", level, shown, ratio);
  context.globalAlpha = opacity;
  if (opacity > 0) paintLayer(layer, level, shown, ratio);
  canvas.dataset.level = level;
  if (waiting) tell(...waiting);
}

function paintLayer(name, level, shown, ratio) {
  const step = 2 ** level, side = TILE * step;
  const [left, top] = [view.x * ratio, view.y * ratio];
  context.imageSmoothingEnabled = shown * step < 1 || (name === "scene" && shown < 2);
  context.imageSmoothingQuality = "high";
  const place = (value, origin) => Math.round(value * shown + origin); // neighbours share their rounded edge
  const last = [Math.ceil(levels[level].height / TILE), columns(level)];
  const range = (origin, length, count) => [
    Math.max(Math.floor(-origin / shown / side), 0), Math.min(Math.ceil((length - origin) / shown / side), count),
  ];
  const [firstRow, endRow] = range(top, canvas.height, last[0]);
  const [firstColumn, endColumn] = range(left, canvas.width, last[1]);
  for (let row = firstRow; row < endRow; row++) {
    for (let column = firstColumn; column < endColumn; column++) {
      const right = Math.min((column + 1) * side, finest.width), bottom = Math.min((row + 1) * side, finest.height);
      const x = place(column * side, left), y = place(row * side, top);
      // The picture itself, or until it is decoded its part of a coarser one.
      for (let coarse = level; coarse < levels.length; coarse++) {
        const ratioOf = 2 ** (coarse - level), unit = 2 ** coarse;
        const r = Math.floor(row / ratioOf), c = Math.floor(column / ratioOf);
        const found = picture(name, coarse, r * columns(coarse) + c);
        if (!found) continue;
        const sx = column * side / unit - c * TILE, sy = row * side / unit - r * TILE;
        const sw = Math.min((right - column * side) / unit, found.naturalWidth - sx);
        const sh = Math.min((bottom - row * side) / unit, found.naturalHeight - sy);
        context.drawImage(found, sx, sy, sw, sh, x, y, place(right, left) - x, place(bottom, top) - y);
        break;
      }
    }
  }
}

function bounds() {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const whole = Math.min(width / finest.width, height / finest.height);
  return { width, height, whole: whole * 0.98, least: Math.min(whole * 0.5, 1), most: Math.max(16, whole) };
}

function settle() {
  const { width, height, least, most } = bounds();
  view.scale = Math.min(Math.max(view.scale, least), most);
  const keep = (at, length, extent) => Math.min(Math.max(at, length / 2 - extent), length / 2); // the middle shows something
  view.x = keep(view.x, width, finest.width * view.scale);
  view.y = keep(view.y, height, finest.height * view.scale);
  canvas.dataset.scale = view.scale;
  draw();
}

function fit(scale) {
  const { width, height, whole } = bounds();
  fitted = scale === undefined;
  const [x, y] = fitted ? [finest.width / 2, finest.height / 2] : at(width / 2, height / 2);
  view.scale = fitted ? whole : scale;
  [view.x, view.y] = [width / 2 - x * view.scale, height / 2 - y * view.scale];
  settle();
}

const at = (x, y) => [(x - view.x) / view.scale, (y - view.y) / view.scale];

function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const { least, most } = bounds();
  const scale = Math.min(Math.max(view.scale * factor, least), most);
  const [px, py] = at(x, y);
  [view.x, view.y, view.scale] = [x - px * scale, y - py * scale, scale];
  fitted = false;
  settle();
}

function move(dx, dy) {
  view.x += dx;
  view.y += dy;
  fitted = false;
  settle();
}

// What lies at a place: read from the pictures, whose colours are those of the legend.
const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
probe.canvas.width = probe.canvas.height = 1;
const numbers = (colours) => new Map(colours.map((colour, k) => [colour.join(), k]).reverse());
const known = { map: numbers(data.palette), confidence: data.confidence && numbers(data.confidence) };
function number(name, x, y) {
  const found = picture(name, 0, Math.floor(y / TILE) * columns(0) + Math.floor(x / TILE));
  if (!found) return undefined;
  probe.clearRect(0, 0, 1, 1);
  probe.drawImage(found, x % TILE, y % TILE, 1, 1, 0, 0, 1, 1);
  const [red, green, blue, alpha] = probe.getImageData(0, 0, 1, 1).data;
  return alpha ? known[name].get([red, green, blue].join()) : null;
}

function tell(x, y) {
  waiting = null;
  const [px, py] = at(x, y).map(Math.floor);
  const within = px >= 0 && py >= 0 && px < finest.width && py < finest.height;
  readout.classList.toggle("empty", !within);
  legend.forEach((row) => row.classList.remove("here"));
  if (!within) return;
  const parts = [], found = number("map", px, py);
  if (found === null) parts.push("no data");
  if (found >= 0) {
    parts.push(data.classes[found]);
    legend[found].classList.add("here");
  }
  const sure = data.confidence && number("confidence", px, py);
  if (found === undefined || sure === undefined) waiting = [x, y]; // until their pictures are decoded
  if (sure >= 0 && sure !== null) parts.push(`${Math.round(100 * (sure + 0.5) / data.confidence.length)} % sure`);
  const [height, width] = data.size;
  const [column, row] = [(px + 0.5) * width / finest.width, (py + 0.5) * height / finest.height];
  parts.push(data.transform ? coordinates(column, row) : `row ${Math.floor(row)}, column ${Math.floor(column)}`);
  readout.textContent = parts.join(" · ");
}

function coordinates(column, row) {
  const [a, b, c, d, e, f] = data.transform;
  const digits = Math.max(0, Math.ceil(-Math.log10(Math.hypot(a, d))));
  return [a * column + b * row + c, d * column + e * row + f].map((value) => value.toFixed(digits)).join(", ");
}

// Mouse, fingers, keys.
const fingers = new Map();
const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, place(event));
  canvas.classList.add("dragged");
});
canvas.addEventListener("pointermove", (event) => {
  const now = place(event), before = fingers.get(event.pointerId);
  if (before && fingers.size === 1) {
    move(now[0] - before[0], now[1] - before[1]);
  } else if (before && fingers.size === 2) {
    const other = [...fingers.entries()].find(([id]) => id !== event.pointerId)[1];
    const apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]);
    const middle = (p) => [(p[0] + other[0]) / 2, (p[1] + other[1]) / 2];
    const [from, to] = [middle(before), middle(now)];
    move(to[0] - from[0], to[1] - from[1]);
    zoom(apart(now) / Math.max(apart(before), 1), ...to);
  }
  if (before) fingers.set(event.pointerId, now);
  tell(...now);
});
for (const ending of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(ending, (event) => {
    fingers.delete(event.pointerId);
    if (!fingers.size) canvas.classList.remove("dragged");
  });
}
canvas.addEventListener("pointerleave", () => {
  waiting = null;
  readout.classList.add("empty");
  legend.forEach((row) => row.classList.remove("here"));
});
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const lines = event.deltaMode === 1 ? 20 : event.deltaMode === 2 ? 400 : 1;
  zoom(2 ** (-Math.max(-300, Math.min(300, event.deltaY * lines)) / 300), ...place(event));
}, { passive: false });
canvas.addEventListener("dblclick", (event) => zoom(2, ...place(event)));
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = Math.min(canvas.clientWidth, canvas.clientHeight) / 5;
  const act = {
    ArrowLeft: () => move(step, 0), ArrowRight: () => move(-step, 0), ArrowUp: () => move(0, step),
    ArrowDown: () => move(0, -step), "+": () => zoom(2), "=": () => zoom(2), "-": () => zoom(1 / 2), "−": () => zoom(1 / 2),
    0: () => fit(), 1: () => fit(1 / (window.devicePixelRatio || 1)),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
  tell(canvas.clientWidth / 2, canvas.clientHeight / 2);
});
const zooms = { in: () => zoom(2), out: () => zoom(1 / 2), fit: () => fit() };
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", zooms[button.dataset.zoom]);
}

// Controls; the browser may remember them from before a reload.
const slider = document.getElementById("opacity"), output = document.querySelector("output"), scale = document.querySelector(".scale");
const apply = () => {
  opacity = slider.value / 100;
  output.textContent = `${slider.value} %`;
  layer = document.querySelector("input[name=layer]:checked")?.value ?? "map";
  if (scale) scale.hidden = layer !== "confidence";
  draw();
};
slider.addEventListener("input", apply);
for (const radio of document.querySelectorAll("input[name=layer]")) radio.addEventListener("change", apply);

new ResizeObserver(() => {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  if (fitted) fit(); else settle();
}).observe(canvas);
readout.classList.add("empty");
apply();

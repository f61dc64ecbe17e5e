// Timelines, drawn from the kernel tables: the tables are the data, so that both say the same.
(() => {
  const MOCK = { name: "mock", start: 6, time: 7, mad: 8, range: 9 };
  const E2E = { name: "E2E", start: 10, time: 11, mad: 12, range: 13 };
  const ZOOMS = [1, 4, 16];
  const full = new Map([...document.querySelectorAll(".names tbody tr")].map(
    (row) => [row.cells[0].textContent.trim(), row.cells[2].textContent.trim()]));

  const number = (text) => Number(text.replaceAll(",", ""));
  const make = (tag, css, parent) => {
    const made = document.createElement(tag);
    made.className = css;
    parent.append(made);
    return made;
  };

  // One launch: where it stands in its table, and what to say of it.
  function launch(row, side, at, alone) {
    const cell = (n) => row.cells[n].textContent.trim();
    if (cell(side.time) === "–") return null;
    const name = row.cells[2].firstChild.textContent.trim();
    const other = [...row.cells[2].childNodes].find((node) => node.textContent.startsWith("mock: "));
    const numbers = cell(3).split("/");
    const own = side === MOCK ? numbers[0] : numbers.at(-1);
    const short = side === MOCK && other ? other.textContent.slice(6).trim() : name;
    const [sign, ...level] = cell(1).split(" ");
    const pick = (text) => text.includes("≠") ? text.split("≠")[side === MOCK ? 0 : 1].trim() : text;
    return {
      row, side, at, short, sign, start: number(cell(side.start)), time: number(cell(side.time)),
      css: row.className.replace("on", "").trim(),
      tip: `${side.name} #${at + 1}: ${short}\n` +
        `start ${cell(side.start)} µs, takes ${cell(side.time)} ± ${cell(side.mad)} µs (${cell(side.range)})\n` +
        `grid ${pick(cell(4))}, block ${pick(cell(5))}\n` +
        `${sign} ${level.join(" ") || "same"}${alone ? "" : `, ratio ${cell(14)}`}` +
        (full.get(own) && full.get(own) !== short ? `\n${full.get(own)}` : ""),
    };
  }

  function niceStep(least) {
    const power = 10 ** Math.floor(Math.log10(least));
    return [1, 2, 5, 10].map((n) => n * power).find((step) => step >= least);
  }

  function drawTicks(ticks, end, zoom) {
    ticks.replaceChildren();
    const step = niceStep(end / (10 * zoom));
    for (let at = 0; at <= end * 1.0001; at += step) {
      const tick = make("span", "", ticks);
      tick.style.left = `${(100 * at) / end}%`;
      const digits = step < 1 ? 2 : 0;
      tick.textContent = at.toLocaleString("en", { maximumFractionDigits: digits }) + (at === 0 ? " µs" : "");
    }
  }

  function link(parent, a, b, end) {
    const x = (time) => (1000 * time) / end;
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M${x(a.start)} 0H${x(a.start + a.time)}L${x(b.start + b.time)} 10H${x(b.start)}Z`);
    if (a.sign !== "=") path.setAttribute("class", "v");
    parent.append(path);
    return path;
  }

  function draw(figure) {
    if (figure.dataset.drawn) return;
    figure.dataset.drawn = "yes";
    const rows = [...document.getElementById(figure.dataset.table).tBodies[0].rows];
    const pairs = rows.map((row, at) => [MOCK, E2E].map((side) =>
      launch(row, side, at, [MOCK, E2E].some((s) => row.cells[s.time].textContent.trim() === "–"))));
    const all = pairs.flat().filter(Boolean);
    const end = Math.max(...all.map((one) => one.start + one.time)) || 1;

    const tools = make("div", "tools", figure);
    const lanes = make("div", "lanes", figure);
    const sides = make("div", "sides", lanes);
    for (const text of ["", "mock", "", "E2E", "", ""]) make("span", "", sides).textContent = text;
    const view = make("div", "view", lanes);
    const canvas = make("div", "canvas", view);
    const signs = [make("div", "signs", canvas)];
    const tracks = [make("div", "track", canvas)];
    const links = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    links.setAttribute("class", "links");
    links.setAttribute("viewBox", "0 0 1000 10");
    links.setAttribute("preserveAspectRatio", "none");
    links.setAttribute("aria-hidden", "true");
    canvas.append(links);
    tracks.push(make("div", "track", canvas));
    signs.push(make("div", "signs", canvas));
    const ticks = make("div", "ticks", canvas);

    pairs.forEach((pair, at) => {
      const together = [rows[at]];
      pair.forEach((one, s) => {
        if (!one) return;
        const block = make("button", `block mark ${one.css}`, tracks[s]);
        block.type = "button";
        block.tabIndex = tracks[s].childElementCount === 1 ? 0 : -1;
        block.style.left = `${(100 * one.start) / end}%`;
        block.style.width = `${(100 * one.time) / end}%`;
        block.dataset.row = at;
        if (s === 0) block.dataset.up = ""; // its tip leaves the other side in sight
        block.setAttribute("aria-label", one.tip);
        make("span", "", block).textContent = one.short;
        together.push(block);
        if (one.css === "x") {
          const sign = make("b", "", signs[s]);
          sign.textContent = one.sign;
          sign.style.left = `${(100 * (one.start + one.time / 2)) / end}%`;
        }
      });
      if (pair[0] && pair[1]) together.push(link(links, pair[0], pair[1], end));
      for (const block of together.slice(1, 3)) {
        for (const [event, on] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]]) {
          block.addEventListener(event, () => together.forEach((one) => one.classList.toggle("on", on)));
        }
      }
    });

    tracks.forEach((track, s) => {
      track.setAttribute("role", "group");
      track.dataset.roving = "";
      track.setAttribute("aria-label", `${["Mock", "E2E"][s]} timeline of ${figure.dataset.name}: ` +
        `${track.childElementCount} launches. Left and right go from launch to launch, up and down to the other side.`);
    });
    figure.addEventListener("keydown", (event) => {
      const to = { ArrowUp: 0, ArrowDown: 1 }[event.key];
      const row = event.target.dataset?.row;
      if (to === undefined || row === undefined) return;
      event.preventDefault();
      const partner = tracks[to].querySelector(`[data-row="${row}"]`);
      if (partner) opkit.focus(partner, tracks[to]);
    });

    const zooms = make("div", "", tools);
    zooms.setAttribute("role", "group");
    zooms.setAttribute("aria-label", "Zoom");
    for (const zoom of ZOOMS) {
      const button = make("button", "", zooms);
      button.type = "button";
      button.textContent = `${zoom}×`;
      button.setAttribute("aria-pressed", String(zoom === 1));
      button.addEventListener("click", () => {
        canvas.style.width = `${100 * zoom}%`;
        drawTicks(ticks, end, zoom);
        for (const other of zooms.children) other.setAttribute("aria-pressed", String(other === button));
      });
    }
    const legend = make("div", "legend", tools);
    for (const [css, text] of [["h", "the longest kernels, alike on both sides"], ["", "others"], ["g", "glue"], ["x", "+ mock only, − E2E only, ≠ other type"]]) {
      const entry = make("span", "", legend);
      make("i", css, entry);
      entry.append(text);
    }
    drawTicks(ticks, end, 1);
  }

  const drawAll = (root) => root.querySelectorAll(".timeline").forEach(draw);
  for (const details of document.querySelectorAll("details.case")) {
    if (details.open) drawAll(details);
    details.addEventListener("toggle", () => details.open && drawAll(details));
  }
  addEventListener("beforeprint", () => drawAll(document));

  // A link to a case opens it.
  function reveal() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) target.open = true;
  }
  addEventListener("hashchange", reveal);
  reveal();
})();

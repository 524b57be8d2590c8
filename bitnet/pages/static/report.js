// The page of a comparison: families, the border of the charts, numbers of a point, what to choose.
{
  const { rows, charts, lower } = JSON.parse(document.getElementById("data").textContent);
  const boxes = [...document.querySelectorAll("input.family")];
  const shown = (row) => boxes.some((box) => box.checked && box.value === row.family);

  // Charts

  const views = [...document.querySelectorAll(".chart")].map((chart) => {
    const column = chart.dataset.chart;
    const points = charts[column].map((index, i) => {
      const group = chart.querySelector(`[data-gid="point-${i}"]`);
      const use = group.querySelector("use");
      const parts = [group, ...chart.querySelectorAll(`[data-gid="mark-${i}"]`)];
      return { row: rows[index], group, parts, x: Number(use.getAttribute("x")), y: Number(use.getAttribute("y")) };
    });
    const tip = document.createElement("p");
    tip.className = "tip";
    tip.hidden = true;
    tip.setAttribute("role", "status");
    chart.append(tip);
    return { chart, column, points, tip, svg: chart.querySelector("svg"), edge: Number(chart.dataset.edge) };
  });

  function drawBorder(view) {
    const sign = lower[view.column] ? 1 : -1;
    const found = [];
    const sorted = view.points.filter((p) => shown(p.row) && p.row.perplexity <= view.edge * (1 + 1e-12));
    sorted.sort((a, b) => sign * (a.x - b.x) || b.y - a.y);
    for (const p of sorted) if (!found.length || p.row.perplexity < found.at(-1).row.perplexity) found.push(p);
    const path = view.svg.querySelector('[data-gid="border"] path');
    path?.setAttribute("d", found.map((p, i) => `${i ? "L" : "M"} ${p.x} ${p.y}`).join(" "));
  }

  function describe(row) {
    const c = row.cells;
    const speed = c.decode ? `\n${c.decode} tokens/s` : "";
    return `${row.name} (${row.family})\nperplexity ${c.perplexity}\n${c["file MB"]} MB, ${c.stored} bits a weight${speed}`;
  }

  function showTip(view, point) {
    for (const p of view.points) p.group.classList.toggle("seen", p === point);
    view.tip.hidden = !point;
    view.at = point;
    if (!point) return;
    view.tip.textContent = describe(point.row);
    const box = view.svg.getBoundingClientRect();
    const scale = box.width / view.svg.viewBox.baseVal.width;
    const left = point.x * scale;
    view.tip.style.top = `${point.y * scale + 12}px`;
    view.tip.style.left = `${Math.max(0, Math.min(left + 8, view.chart.clientWidth - view.tip.offsetWidth))}px`;
  }

  for (const view of views) {
    view.svg.tabIndex = 0;
    view.svg.addEventListener("pointermove", (event) => {
      const box = view.svg.getBoundingClientRect();
      const scale = view.svg.viewBox.baseVal.width / box.width;
      const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
      let near = null;
      let least = 18 * scale;
      for (const p of view.points) {
        const distance = Math.hypot(p.x - x, p.y - y);
        if (shown(p.row) && distance < least) [near, least] = [p, distance];
      }
      if (near !== view.at) showTip(view, near);
    });
    view.svg.addEventListener("pointerleave", () => showTip(view, null));
    view.svg.addEventListener("blur", () => showTip(view, null));
    view.svg.addEventListener("keydown", (event) => {
      const order = view.points.filter((p) => shown(p.row)).sort((a, b) => a.x - b.x || a.y - b.y);
      const at = order.indexOf(view.at);
      const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: order.length - 1 }[event.key];
      if (event.key === "Escape") return showTip(view, null);
      if (next === undefined || !order.length) return;
      event.preventDefault();
      showTip(view, order[Math.max(0, Math.min(next, order.length - 1))]);
    });
  }

  // What to choose

  function picked(name) {
    const slider = document.getElementById(name);
    if (!slider) return 0;
    const text = slider.dataset.texts.split("|")[slider.value];
    slider.closest(".control").querySelector("output").value = text;
    slider.setAttribute("aria-valuetext", text);
    return Number(slider.dataset.values.split(",")[slider.value]);
  }

  function line(row) {
    const speed = row.cells.decode ? `, ${row.cells.decode} tokens/s` : "";
    return `perplexity ${row.cells.perplexity}, ${row.cells["file MB"]} MB${speed}`;
  }

  function choose() {
    const [size, speed] = [picked("budget"), picked("speed")];
    const fits = rows.filter((row) => shown(row) && row.file_mb <= size && (!speed || (row.decode || 0) >= speed));
    fits.sort((a, b) => a.perplexity - b.perplexity || a.file_mb - b.file_mb);
    const best = fits[0];
    for (const view of views) for (const p of view.points) p.group.classList.toggle("chosen", p.row === best);
    const box = document.getElementById("choice");
    if (!best) {
      box.textContent = "Nothing that is shown is that small and that fast.";
      return;
    }
    const name = document.createElement("strong");
    name.textContent = best.name;
    box.replaceChildren(name, document.createTextNode(` (${best.family}): ${line(best)}.`));
    const equal = fits.slice(1).filter((row) => row.gap - best.gap <= 2 * Math.hypot(row.gap_error, best.gap_error)
      && (row.file_mb < best.file_mb || (row.decode || 0) > (best.decode || 0)));
    if (!equal.length) return;
    const list = document.createElement("ul");
    list.append(...equal.slice(0, 4).map((row) => {
      const item = document.createElement("li");
      item.textContent = `${row.name}: ${line(row)}`;
      return item;
    }));
    const note = document.createElement("p");
    note.textContent = "Within two standard errors of it, and smaller or faster:";
    box.append(note, list);
  }

  // Tables

  for (const heading of document.querySelectorAll("#table thead th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = heading.closest("table").tBodies[0];
      const value = (row) => row.cells[heading.cellIndex].textContent.replace(/^>/, "");
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (!x || !y) return Number(!x) - Number(!y); // what was not measured comes last
        const [p, q] = [parseFloat(x), parseFloat(y)];
        return (up ? 1 : -1) * (isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q);
      };
      body.append(...[...body.rows].sort(compare));
    });
  }

  function update() {
    for (const view of views) {
      showTip(view, null);
      for (const p of view.points) for (const part of p.parts) part.classList.toggle("off", !shown(p.row));
      drawBorder(view);
    }
    for (const row of document.querySelectorAll("tr[data-family]")) row.hidden = !shown({ family: row.dataset.family });
    choose();
  }

  for (const box of boxes) box.addEventListener("change", update);
  for (const name of ["budget", "speed"]) document.getElementById(name)?.addEventListener("input", choose);
  update();
}

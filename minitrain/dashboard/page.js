"use strict";
/* What the page does: rows for the pictures out of packed numbers, one range of steps for all of them, one chosen step.

   Vega draws axes, lines, bands and marks. Zoom, cursor, tooltips and the choice of a step are done here, on a layer
   over each picture, so that nothing need be drawn again while the pointer moves. */
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, set = {}, ...inside) => {
    const element = Object.assign(document.createElement(tag), set);
    element.append(...inside);
    return element;
  };
  const whole = [page.start, page.end];
  const sight = { lo: whole[0], hi: whole[1], step: null, window: page.window };
  const lanes = [];

  function settle(line) {
    if (!line.source || line.settled === sight.window) return;
    line.at = line.source.at;
    line.value = runningMean(line.source, sight.window);
    line.settled = sight.window;
  }

  function rowsOf(lane) {
    const rows = [], buckets = lane.lines.length > 6 ? 250 : 600;
    for (const line of lane.lines) {
      settle(line);
      const beyond = line.stems ? 0 : 1;
      const from = Math.max(0, indexOf(line.at, lane.lo()) - beyond);
      const to = Math.min(line.at.length, indexOf(line.at, lane.hi() + 1) + beyond);
      const kept = extremes(line.value, from, to, buckets);
      const fits = (x) => Number.isFinite(x) && (!lane.log || x > 0);
      const few = line.points && kept.length <= 120;
      kept.forEach((i, k) => {
        const here = fits(line.value[i]);
        const lonely = here && !fits(line.value[kept[k - 1]]) && !fits(line.value[kept[k + 1]]);
        const row = { step: line.at[i], value: here ? line.value[i] : null, series: line.name, alone: here && !line.stems && (few || lonely), stem: line.stems };
        if (line.spread && here && Number.isFinite(line.spread[i])) {
          row.low = line.value[i] - line.spread[i];
          row.high = line.value[i] + line.spread[i];
        }
        rows.push(row);
      });
    }
    if (lane.log) {
      /* A band that reaches to 0 or below ends at the bottom of the picture, and does not pull it down. */
      const bottom = 0.8 * rows.reduce((low, row) => (row.value > 0 ? Math.min(low, row.value) : low), Infinity);
      for (const row of rows) if (row.low < bottom) row.low = bottom;
    }
    return rows;
  }

  /* Levels such as the baseline stay while they are near what is in sight, so that a zoom may go closer. */
  function levelsOf(lane, rows) {
    if (sight.lo === whole[0] && sight.hi === whole[1]) return lane.levels;
    const seen = rows.filter((r) => r.value !== null).map((r) => r.value);
    const low = Math.min(...seen), high = Math.max(...seen), room = high - low || Math.abs(high) || 1;
    return lane.levels.filter((l) => l.value > low - room && l.value < high + room);
  }

  const inSight = (lane) => (m) => m.step >= lane.lo() && m.step <= lane.hi();

  /* Lanes */

  function Lane(figure) {
    const id = figure.dataset.lane, lane = Object.assign(this, page.lanes[id], { id, figure, lit: new Set(), dirty: false, near: true });
    unpack(lane.lines);
    lane.overview = id === "overview";
    lane.lo = () => (lane.overview ? whole[0] : sight.lo);
    lane.hi = () => (lane.overview ? whole[1] : sight.hi);
    lane.vis = figure.querySelector(".vis");
    lane.over = figure.querySelector(".over");
    for (const name of ["cursor", "chosen", lane.overview ? "window" : "drag"]) {
      lane[name] = lane.over.appendChild(make("div", { className: name }));
    }
  }
  Lane.prototype = {
    async draw() {
      this.view?.finalize();
      const spec = structuredClone(this.spec), rows = rowsOf(this);
      spec.datasets = { rows, marks: page.marks.filter(inSight(this)), spikes: page.spikes.filter(inSight(this)), levels: levelsOf(this, rows) };
      for (const param of spec.params) param.value = { lo: this.lo(), hi: this.hi(), lit: [...this.lit] }[param.name];
      if (this.log !== this.logAtFirst) setLog(spec, this.log, this.zero);
      this.view = (await vegaEmbed(this.vis, spec, { renderer: "svg", actions: false, tooltip: false, logLevel: 1 })).view;
      const svg = this.vis.querySelector("svg");
      svg.setAttribute("role", "graphics-document document");
      svg.setAttribute("aria-label", this.description);
      svg.prepend(svgText("title", this.title), svgText("desc", this.description));
      this.place();
    },
    async show() {
      const rows = rowsOf(this);
      this.view.signal("lo", this.lo()).signal("hi", this.hi()).signal("lit", [...this.lit]);
      this.view.data("rows", rows).data("marks", page.marks.filter(inSight(this))).data("spikes", page.spikes.filter(inSight(this)));
      if (this.levels.length) this.view.data("levels", levelsOf(this, rows));
      await this.view.runAsync();
      this.place();
    },
    x0() { return this.view.origin()[0] + this.view.padding().left; },
    pixel(step) { return this.x0() + ((step - this.lo()) / (this.hi() - this.lo())) * this.view.width(); },
    step(pixel) { return this.lo() + ((pixel - this.x0()) / this.view.width()) * (this.hi() - this.lo()); },
    put(element, from, to) {
      const [a, b] = [from, to].map((s) => (s === null || s === undefined ? s : Math.min(Math.max(this.pixel(s), this.x0()), this.x0() + this.view.width())));
      const seen = from !== null && (to !== undefined || (from >= this.lo() && from <= this.hi()));
      element.style.display = seen ? "block" : "none";
      if (!seen) return;
      Object.assign(element.style, { left: `${a}px`, top: `${this.view.origin()[1] + this.view.padding().top}px`, height: `${this.view.height()}px` });
      if (to !== undefined) element.style.width = `${Math.max(2, b - a)}px`;
    },
    place() {
      if (!this.view) return;
      this.put(this.chosen, sight.step);
      if (this.overview && (sight.lo > whole[0] || sight.hi < whole[1])) this.put(this.window, sight.lo, sight.hi);
      else if (this.overview) this.window.style.display = "none";
    },
  };
  const svgText = (tag, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    element.textContent = text;
    return element;
  };
  function setLog(node, log, zero) {
    if (Array.isArray(node)) node.forEach((part) => setLog(part, log, zero));
    else if (node && typeof node === "object") {
      if (node.y?.scale) node.y.scale = log ? { type: "log", padding: 4 } : { type: "linear", nice: true, ...(zero ? { domainMin: 0 } : { zero: false }) };
      Object.values(node).forEach((part) => setLog(part, log, zero));
    }
  }

  /* The range in sight */

  let asked = false;
  function setRange(lo, hi) {
    [lo, hi] = [Math.min(lo, hi), Math.max(lo, hi)].map(Math.round);
    lo = Math.min(Math.max(lo, whole[0]), whole[1] - 1);
    hi = Math.max(Math.min(hi, whole[1]), lo + 1);
    if (!Number.isFinite(lo + hi) || (lo === sight.lo && hi === sight.hi)) return;
    Object.assign(sight, { lo, hi });
    refresh();
  }
  function refresh() {
    $("lo").value = sight.lo;
    $("hi").value = sight.hi;
    lanes.forEach((lane) => { lane.dirty = true; });
    if (!asked) requestAnimationFrame(() => { asked = false; showDirty(); });
    asked = true;
    remember();
  }
  async function showDirty() {
    for (const lane of lanes) {
      if (lane.overview) lane.place();
      else if (lane.dirty && lane.near && lane.view) { lane.dirty = false; await lane.show(); }
    }
  }
  function remember() {
    const parts = [];
    if (sight.lo !== whole[0] || sight.hi !== whole[1]) parts.push(`steps=${sight.lo}-${sight.hi}`);
    if (sight.step !== null) parts.push(`step=${sight.step}`);
    try { history.replaceState(null, "", parts.length ? `#${parts.join("&")}` : location.pathname + location.search); } catch { /* a place without addresses */ }
  }
  function recall() {
    const range = /steps=(\d+)-(\d+)/.exec(location.hash), step = /(?:^#|&)step=(\d+)/.exec(location.hash);
    if (range) setRange(+range[1], +range[2]);
    if (step) choose(+step[1]);
  }
  const all = () => setRange(...whole);
  function zoom(factor, around = (sight.lo + sight.hi) / 2) {
    const half = Math.max(2, ((sight.hi - sight.lo) * factor) / 2);
    setRange(around - half, around + half);
  }

  /* The chosen step */

  const logged = (step) => page.logged.at[nearest(page.logged.at, step)];
  const valueAt = (line, step) => {
    settle(line);
    const i = indexOf(line.at, step);
    return line.at[i] === step ? line.value[i] : undefined;
  };
  function choose(step) {
    if (!page.logged.at.length) return;
    sight.step = logged(step);
    lanes.forEach((lane) => lane.place());
    $("step").hidden = false;
    $("at").value = sight.step;
    const text = [];
    for (const [lane, name, label] of page.bar) {
      const line = lanes.find((l) => l.id === lane)?.lines.find((l) => l.name === name);
      const value = line && valueAt(line, sight.step);
      if (value !== undefined) text.push(`${label} ${show(value)}`);
    }
    text.push(...page.marks.filter((m) => m.step === sight.step).map((m) => m.text));
    text.push(...page.spikes.filter((s) => s.step === sight.step).map((s) => `spike${s.sigmas === null ? "" : ` +${s.sigmas}σ`}`));
    $("numbers").textContent = text.join("  ·  ");
    const commands = page.runs.filter((r) => sight.step >= r.recorded[0] && sight.step < r.recorded[1]);
    $("commands").replaceChildren(...commands.map((run) => commandRow(run.command.replace("{step}", sight.step))));
    if (!commands.length) $("commands").append(make("p", { className: "soft", textContent: page.unrecorded }));
    showBatch();
    remember();
  }
  function showBatch() {
    const batch = page.batches, list = $("batch").querySelector("ol");
    $("batch").hidden = !batch;
    if (!batch) return;
    const i = indexOf(batch.at, sight.step), known = batch.at[i] === sight.step;
    const rows = known ? [...batch.rows.subarray(i * batch.size, (i + 1) * batch.size)] : [];
    $("batch").querySelector("summary").textContent = known ? `its batch: ${rows.length} samples` : "its batch: not in this page, --print-batch tells";
    list.replaceChildren(...rows.map((row) => {
      const sample = batch.samples[row];
      return make("li", { textContent: row < 0 ? "not of the training split (an injection)" : sample ? `${sample[0]}  ${sample[1]}` : `sample ${row}` });
    }));
  }
  function unchoose() {
    sight.step = null;
    $("step").hidden = true;
    lanes.forEach((lane) => lane.place());
    remember();
  }
  function neighbour(by) {
    const at = page.logged.at, i = indexOf(at, sight.step ?? sight.lo) + by;
    const step = at[Math.min(Math.max(i, 0), at.length - 1)];
    if (step < sight.lo || step > sight.hi) setRange(sight.lo + by, sight.hi + by);
    choose(step);
  }
  function commandRow(text) {
    const button = make("button", { type: "button", className: "copy", textContent: "Copy" }), told = make("span", { className: "copied", role: "status" });
    button.addEventListener("click", async () => { told.textContent = (await copy(text)) ? "copied" : "select it and copy by hand"; });
    return make("div", { className: "row" }, make("code", { className: "command", textContent: text }), button, told);
  }

  /* The pointer over a picture */

  function hover(lane, event) {
    const step = lane.step(event.offsetX);
    if (step < lane.lo() || step > lane.hi()) return leave();
    lanes.forEach((other) => other.view && other.put(other.cursor, step));
    if (lane.overview || !page.logged.at.length) return;
    const tip = $("tip"), shown = [];
    for (const line of lane.lines) {
      settle(line);
      const i = nearest(line.at, step);
      if (i >= line.at.length || (line.stems && line.at[i] !== logged(step))) continue;
      if (lane.lit.size && !lane.lit.has(line.name)) continue;
      shown.push({ line, step: line.at[i], value: line.value[i] });
    }
    shown.sort((a, b) => (b.value || -Infinity) - (a.value || -Infinity));
    const own = logged(step), marks = page.marks.filter((m) => Math.abs(lane.pixel(m.step) - event.offsetX) < 5);
    tip.replaceChildren(make("b", { textContent: `step ${own.toLocaleString("en")}` }));
    for (const one of shown.slice(0, 18)) {
      const swatch = lane.figure.querySelector(`[data-series="${CSS.escape(one.line.name)}"] svg`)?.cloneNode(true);
      const late = one.step !== own ? ` (step ${one.step.toLocaleString("en")})` : "";
      tip.append(make("span", {}, ...(swatch ? [swatch] : []), one.line.name + late, make("i", { textContent: one.line.stems ? "yes" : show(one.value) })));
    }
    for (const mark of marks) tip.append(make("span", { textContent: `${mark.text} (step ${mark.step.toLocaleString("en")})` }));
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), right = event.clientX + 16 + box.width < innerWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX + 16 : event.clientX - 16 - box.width)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - box.height - 4))}px`;
  }
  function leave() {
    $("tip").hidden = true;
    lanes.forEach((lane) => { lane.cursor.style.display = "none"; });
  }

  function listen(lane) {
    const over = lane.over;
    let drag = null;
    over.addEventListener("pointerdown", (event) => {
      if (event.button || !lane.view) return;
      const at = lane.step(event.offsetX), reach = (8 / lane.view.width()) * (lane.hi() - lane.lo());
      drag = { x: event.offsetX, at, kind: "new", lo: sight.lo, hi: sight.hi };
      if (lane.overview && (sight.lo > whole[0] || sight.hi < whole[1])) {
        if (Math.abs(at - sight.lo) < reach) drag.kind = "lo";
        else if (Math.abs(at - sight.hi) < reach) drag.kind = "hi";
        else if (at > sight.lo && at < sight.hi) drag.kind = "move";
      }
      over.setPointerCapture(event.pointerId);
    });
    over.addEventListener("pointermove", (event) => {
      if (!lane.view) return;
      hover(lane, event);
      if (!drag || Math.abs(event.offsetX - drag.x) < 5) return;
      drag.moved = true;
      const at = lane.step(event.offsetX);
      if (!lane.overview) lane.put(lane.drag, Math.min(drag.at, at), Math.max(drag.at, at));
      else if (drag.kind === "new") setRange(drag.at, at);
      else if (drag.kind === "lo") setRange(at, drag.hi);
      else if (drag.kind === "hi") setRange(drag.lo, at);
      else {
        const by = Math.min(Math.max(at - drag.at, whole[0] - drag.lo), whole[1] - drag.hi);
        setRange(drag.lo + by, drag.hi + by);
      }
    });
    over.addEventListener("pointerup", (event) => {
      if (!drag) return;
      const at = lane.step(event.offsetX);
      if (!lane.overview) lane.drag.style.display = "none";
      if (drag.moved && !lane.overview) setRange(drag.at, at);
      else if (!drag.moved) choose(at);
      drag = null;
    });
    over.addEventListener("pointercancel", () => { drag = null; });
    over.addEventListener("pointerleave", leave);
    over.addEventListener("dblclick", all);
    over.addEventListener("keydown", (event) => {
      const many = event.shiftKey ? 10 : 1;
      const does = { ArrowLeft: () => neighbour(-many), ArrowRight: () => neighbour(many), "+": () => zoom(0.5, sight.step ?? undefined), "-": () => zoom(2, sight.step ?? undefined), Home: () => choose(sight.lo), End: () => choose(sight.hi) }[event.key];
      if (!does) return;
      event.preventDefault();
      does();
    });
    lane.figure.querySelectorAll(".legend button").forEach((button) => button.addEventListener("click", () => {
      const name = button.dataset.series;
      if (!lane.lit.delete(name)) lane.lit.add(name);
      button.setAttribute("aria-pressed", lane.lit.has(name));
      button.parentElement.classList.toggle("some", lane.lit.size > 0);
      lane.show();
    }));
    const scale = lane.figure.querySelector(".scale");
    scale?.addEventListener("click", async () => {
      lane.log = !lane.log;
      scale.textContent = lane.log ? "log" : "linear";
      await lane.draw();
    });
    lane.figure.querySelector(".save")?.addEventListener("click", async () =>
      download(`${page.name}-${lane.id}.svg`, await lane.view.toSVG(), "image/svg+xml"));
    lane.figure.querySelector(".numbers")?.addEventListener("click", () =>
      download(`${page.name}-${lane.id}.csv`, csv(lane.lines, lane.lo(), lane.hi()), "text/csv"));
  }

  /* Controls */

  function controls() {
    for (const id of ["lo", "hi"]) $(id).addEventListener("change", () => setRange(+$("lo").value, +$("hi").value));
    for (const form of ["range", "pick"]) $(form).addEventListener("submit", (event) => event.preventDefault());
    $("all").addEventListener("click", all);
    $("at").addEventListener("change", () => choose(+$("at").value));
    $("earlier").addEventListener("click", () => neighbour(-1));
    $("later").addEventListener("click", () => neighbour(1));
    $("close").addEventListener("click", unchoose);
    addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      if (sight.lo !== whole[0] || sight.hi !== whole[1]) all(); else unchoose();
    });
    addEventListener("hashchange", recall);
    addEventListener("resize", () => setTimeout(() => lanes.forEach((lane) => lane.place()), 120));
    document.querySelectorAll("[data-step]").forEach((button) => button.addEventListener("click", () => {
      const step = +button.dataset.step;
      setRange(step - 50, step + 100);
      choose(step);
    }));
    const slider = $("window");
    slider.max = Math.max(sight.window, Math.min(100, Math.floor(page.logged.at.length / 4)));
    slider.value = Math.floor(sight.window / 2);
    const told = () => { $("window-shown").textContent = sight.window; };
    told();
    slider.addEventListener("input", () => { sight.window = 2 * +slider.value + 1; told(); refresh(); });
    const themes = ["system", "light", "dark"], theme = (name) => {
      if (name === "system") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = name;
      $("theme").textContent = `theme: ${name}`;
    };
    $("theme").addEventListener("click", () => theme(themes[(themes.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % 3]));
    const watch = new IntersectionObserver((seen) => {
      seen.forEach((one) => { one.target.lane.near = one.isIntersecting; });
      showDirty();
    }, { rootMargin: "400px" });
    lanes.forEach((lane) => { lane.figure.lane = lane; watch.observe(lane.figure); });
    addEventListener("beforeprint", () => lanes.forEach((lane) => { lane.near = true; if (lane.dirty) lane.show(); }));
  }

  async function begin() {
    page.logged.at = unpackSteps(page.logged);
    if (page.batches) Object.assign(page.batches, { at: unpackSteps(page.batches.steps), rows: new Int32Array(bytes(page.batches.rows)) });
    for (const figure of document.querySelectorAll("[data-lane]")) {
      const lane = new Lane(figure);
      lane.logAtFirst = lane.log;
      lanes.push(lane);
    }
    $("lo").value = sight.lo;
    $("hi").value = sight.hi;
    controls();
    for (const lane of lanes) {
      await lane.draw();
      listen(lane);
      await new Promise((done) => setTimeout(done));
    }
    recall();
    document.documentElement.dataset.ready = "yes";
  }
  window.minitrain = { page, sight, lanes, setRange, choose };
  begin();
})();

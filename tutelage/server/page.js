// What charts need in the browser: the points they have, so that only new ones travel. Everything else is Python.
window.tutelage = (() => {
  const charts = new Map();  // element id -> {key, kind, series: {name: points}}
  const points = new Map();  // stage -> {series name -> [[x, y], ...]}
  let shown = {main: "", others: []};  // which stage is drawn, and which lie over it, shifted by ticks
  let marks = [], ends = {};
  const css = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
  const esc = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const color = (i) => css(`--c${i % 8}`);
  const number = (y) => {
    if (y === null || y === undefined) return "–";
    const size = Math.abs(y);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return y.toExponential(2);
    return size >= 1000 ? Math.round(y).toLocaleString("en-US") : String(Number(y.toPrecision(4)));
  };
  const size = (y) => { const [by, unit] = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([by]) => y >= by) ?? [1, "B"]; return `${Number((y / by).toPrecision(3))} ${unit}`; };
  const short = (spec) => (y) => spec.bytes ? size(y) : spec.percent ? `${Math.round(100 * y)} %` : spec.tiny && y ? y.toExponential(1).replace("e-", "e−") : number(y);
  const found = (id) => getElement(id)?.chart;

  function belongs(spec, name) {
    return spec.names.includes(name) || spec.prefixes.some((p) => name.startsWith(p));
  }
  function label(spec, name) {
    const prefix = spec.prefixes.find((p) => name.startsWith(p));
    return prefix ? name.slice(prefix.length) : (spec.labels[name] ?? name);
  }
  function lines(spec) {
    const out = [], order = [];
    for (const [i, stage] of [{stage: shown.main, label: "", shift: 0}, ...(spec.overlay ? shown.others : [])].entries()) {
      for (const [name, data] of Object.entries(points.get(stage.stage) ?? {})) {
        if (!belongs(spec, name) || !data.length) continue;
        const said = label(spec, name);
        if (!order.includes(said)) order.push(said);
        out.push({
          id: `${stage.stage}|${name}`, name: stage.label ? `${said} · ${stage.label}` : said, type: "line",
          data: stage.shift ? data.map(([x, y]) => [x + stage.shift, y]) : data,
          showSymbol: spec.symbols || data.length < 2, symbolSize: 5, sampling: false, connectNulls: false, animation: false,
          step: spec.stack ? "end" : false,
          color: color(order.indexOf(said)), lineStyle: {width: i ? 1.2 : 1.7, type: i ? ["dashed", "dotted"][(i - 1) % 2] : "solid", opacity: i ? 0.8 : 1},
          ...(spec.stack && !i ? {stack: "all", areaStyle: {opacity: 0.35}} : {}), emphasis: {disabled: true},
        });
      }
    }
    if (out.length) out[0].markLine = marked(spec);
    return out;
  }
  function marked(spec) {
    const here = marks.filter((m) => m.kind !== "nan" || belongs(spec, m.series));
    const first = ends.first ?? 0, early = first + 0.2 * Math.max(1, (ends.last ?? 0) - first);  // no room for words before it
    return {
      symbol: "none", silent: true, animation: false,
      data: here.map((m) => m.kind === "nan"
        ? {xAxis: m.x, lineStyle: {color: css("--bad"), type: "dotted", width: 1.5}, label: {formatter: m.short, color: css("--bad"), fontSize: 10, position: "insideEndTop", rotate: 0, align: m.x < early ? "left" : "right"}}
        : {xAxis: m.x, lineStyle: {color: css("--accent"), type: "solid", width: 1, opacity: 0.6}, label: {formatter: "▾", position: "end", distance: -2, color: css("--accent"), fontSize: 11}}),
    };
  }
  function tip(id, params) {
    const at = params[0]?.axisValue ?? 0, span = Math.max(1, (ends.last ?? 0) - (ends.first ?? 0));
    const spec = charts.get(id);
    const rows = params.filter((p) => p.value[1] !== null).map((p) =>
      `<div class="line ends" style="gap:1.4rem"><span>${p.marker}${esc(p.seriesName)}</span><b>${(spec.percent || spec.bytes ? short(spec) : number)(p.value[1])}</b></div>`);
    const near = marks.filter((m) => Math.abs(m.x - at) <= span * 0.012 && (m.kind !== "nan" || belongs(spec, m.series))).slice(0, 4).map((m) =>
      `<div style="max-width:22rem;white-space:normal;border-top:1px solid ${css("--line")};margin-top:.3rem;padding-top:.3rem">${esc(m.text)}</div>`);
    return `<div class="soft">tick ${number(Math.round(at))}</div>${rows.join("")}${near.join("")}`;
  }
  function skin(spec, many) {
    const soft = css("--soft"), line = css("--line");
    const axis = {axisLabel: {color: soft, fontSize: 11, hideOverlap: true}, axisLine: {lineStyle: {color: line}}, splitLine: {lineStyle: {color: line}}, axisTick: {show: false}};
    return {
      xAxis: {...axis, splitLine: {show: false}, min: ends.first ?? 0, max: Math.max(1, ends.last ?? 1)},
      yAxis: {...axis, axisLine: {show: false}, axisLabel: {...axis.axisLabel, formatter: short(spec)}},
      legend: {show: many, textStyle: {color: soft, fontSize: 11}, inactiveColor: css("--faint"), pageTextStyle: {color: soft}},
      tooltip: {backgroundColor: css("--panel"), borderColor: line, textStyle: {color: css("--ink"), fontSize: 12}},
    };
  }
  function draw(id) {
    const spec = charts.get(id), chart = found(id);
    if (!spec) return;
    if (!chart) { if (document.getElementById(`c${id}`)) setTimeout(() => draw(id), 30); return; }
    const series = lines(spec), names = series.map((s) => s.id).join();
    const many = series.length > 1 && !spec.bare;
    chart.setOption({...skin(spec, many), series, ...(spec.bare ? {} : {grid: {top: many ? 34 : 14}})}, spec.names_drawn === names ? {} : {replaceMerge: ["series"]});
    spec.names_drawn = names;
    document.getElementById(`c${id}`)?.setAttribute("data-points", series.reduce((n, s) => n + s.data.length, 0));
    window.tutelage.drawn ??= performance.now();
  }
  let waiting = false;
  function all() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; for (const id of charts.keys()) document.getElementById(`c${id}`)?.offsetParent ? draw(id) : (charts.get(id).stale = true); });
  }
  return {
    tip,
    add(id, spec) { charts.set(id, spec); all(); },
    drop(id) { charts.delete(id); },
    show(main, others) { shown = {main, others}; const keep = [main, ...others.map((o) => o.stage)]; for (const k of points.keys()) if (!keep.includes(k)) points.delete(k); all(); },
    // {stage, full, series: {name: [from, [[x, y], ...]]}, marks, first, last}
    take(said) {
      const have = said.full ? {} : (points.get(said.stage) ?? {});
      for (const [name, [from, more]] of Object.entries(said.series)) {
        const old = have[name] ?? [];
        old.length = Math.min(from, old.length);
        for (const p of more) old.push(p);
        have[name] = old;
      }
      points.set(said.stage, have);
      if (said.stage === shown.main) { if (said.marks) marks = said.marks; ends = {first: said.first, last: said.last}; }
      all();
    },
    again: all,
    // follows the system until somebody says otherwise; the choice stays in this browser
    theme(next) {
      const order = ["auto", "light", "dark"];
      let now = localStorage.getItem("tutelage.theme") ?? "auto";
      if (next) { now = order[(order.indexOf(now) + 1) % 3]; localStorage.setItem("tutelage.theme", now); }
      Quasar.Dark.set(now === "auto" ? "auto" : now === "dark");
      document.documentElement.style.colorScheme = now === "auto" ? "light dark" : now;
      return now;
    },
  };
})();
addEventListener("DOMContentLoaded", () =>
  new MutationObserver(() => window.tutelage.again()).observe(document.body, {attributes: true, attributeFilter: ["class"]}));

const points = JSON.parse(document.getElementById("points").textContent);
const $ = id => document.getElementById(id), svg = $("plot"), W = 860, H = 420, M = {l: 56, r: 190, t: 14, b: 46};
const colours = ["#c0392b", "#2c7fb8", "#3a8f5c", "#e08e0b", "#7f8c8d", "#8e44ad", "#16a085", "#d35400", "#34495e", "#c2185b"];
const methods = [...new Set(points.map(p => p.method))], hidden = new Set();
function fill(id, values) { for (const v of values) $(id).add(new Option(v.replaceAll("_", " "), v)); $(id).onchange = draw; }
fill("metric", [...new Set(points.map(p => p.metric))]); fill("split", [...new Set(points.map(p => p.split))]);
fill("cost", ["generated", "prefilled", "critical_path", "attention", "money"].filter(c => points.some(p => p[c] != null)));
$("log").onchange = draw;
function el(name, attributes, text) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return e;
}
function draw() {
  const cost = $("cost").value, log = $("log").checked;
  const chosen = points.filter(p => p.metric == $("metric").value && p.split == $("split").value && p[cost] != null);
  const shown = chosen.filter(p => !hidden.has(p.method)), xs = shown.map(p => p[cost]).filter(x => !log || x > 0);
  svg.replaceChildren();
  const low = log ? Math.min(...xs) : 0, high = Math.max(...xs, low + 1e-9), top = Math.max(0.05, ...shown.map(p => p.ci_high));
  const f = log ? Math.log : (x => x), X = x => M.l + (W - M.l - M.r) * (f(x) - f(low)) / ((f(high) - f(low)) || 1);
  const Y = y => H - M.b - (H - M.t - M.b) * y / top;
  for (let i = 0; i <= 5; i++) {
    const y = top * i / 5, x = log ? Math.exp(f(low) + (f(high) - f(low)) * i / 5) : low + (high - low) * i / 5;
    svg.append(el("line", {x1: M.l, x2: W - M.r, y1: Y(y), y2: Y(y), stroke: "#8884"}));
    svg.append(el("text", {x: M.l - 8, y: Y(y) + 4, "text-anchor": "end", class: "tick"}, y.toFixed(2)));
    svg.append(el("text", {x: X(x), y: H - M.b + 18, "text-anchor": "middle", class: "tick"}, Number(x.toPrecision(3)).toLocaleString("en")));
  }
  svg.append(el("text", {x: (M.l + W - M.r) / 2, y: H - 8, "text-anchor": "middle", class: "tick"}, "mean cost of a task: " + cost.replaceAll("_", " ")));
  methods.forEach((method, i) => {
    const colour = colours[i % colours.length], off = hidden.has(method);
    const key = el("text", {x: W - M.r + 16, y: M.t + 14 + 20 * i, fill: colour, class: "key", opacity: off ? 0.35 : 1}, "● " + method.replaceAll("_", " "));
    key.onclick = () => { off ? hidden.delete(method) : hidden.add(method); draw(); };
    svg.append(key);
    if (off) return;
    const line = chosen.filter(p => p.method == method && (!log || p[cost] > 0)).sort((a, b) => a[cost] - b[cost]);
    svg.append(el("polyline", {points: line.map(p => X(p[cost]) + "," + Y(p.accuracy)).join(" "), fill: "none", stroke: colour, "stroke-width": 2}));
    for (const p of line) {
      svg.append(el("line", {x1: X(p[cost]), x2: X(p[cost]), y1: Y(p.ci_low), y2: Y(p.ci_high), stroke: colour, opacity: 0.4}));
      const dot = el("circle", {cx: X(p[cost]), cy: Y(p.accuracy), r: 4, fill: colour});
      dot.append(el("title", {}, `${method}, budget ${p.budget}: ${p.accuracy.toFixed(3)} [${p.ci_low.toFixed(3)}, ${p.ci_high.toFixed(3)}], ` +
        `${p[cost].toPrecision(4)} ${cost}, spawns ${(100 * p.spawn_rate).toFixed(0)}%, n = ${p.n}`));
      svg.append(dot);
    }
  });
}
draw();

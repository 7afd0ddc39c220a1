
(() => {
  const list = document.getElementById("cards");
  if (!list) return;
  const [controls, order, filter, threshold] = ["controls", "order", "filter", "threshold"].map((id) =>
    document.getElementById(id));
  const [limit, count, none, save, which, cut] = ["limit", "count", "none", "save", "which", "cut"].map((id) =>
    document.getElementById(id));
  const numbers = ["rank", "probability", "structure", "cosine"];
  const pairs = [...list.querySelectorAll(".pair")].map((element) => ({
    element,
    card: element.closest(".card"),
    key: element.dataset.key,
    text: element.textContent.toLowerCase(),
    ...Object.fromEntries(numbers.map((name) => [name, Number(element.dataset[name])])),
  }));
  const cards = [...list.children];
  // The slider moves by pairs, not by values: most of the pairs shown are about as unlikely.
  const probabilities = pairs.map((pair) => pair.probability).sort((a, b) => a - b);
  const shown = () => [...list.querySelectorAll(".card:not([hidden]) .pair:not([hidden])")];

  // Marks outlive the visit where the browser lets a file keep something.
  const store = `marks of ${location.pathname}`;
  const recalled = () => { try { return JSON.parse(localStorage.getItem(store)) || {}; } catch { return {}; } };
  const marks = new Map(Object.entries(recalled()).filter(([, mark]) => mark === "drop" || mark === "keep"));
  const identity = (element) => `${element.dataset.rank} ${element.dataset.key}`;
  const paint = (element) => {
    const mark = marks.get(identity(element));
    element.dataset.marked = mark || "";
    for (const button of element.querySelectorAll("[data-mark]")) {
      button.setAttribute("aria-pressed", String(button.dataset.mark === mark));
    }
  };
  const mark = (element, what) => {
    if (marks.get(identity(element)) === what) marks.delete(identity(element));
    else marks.set(identity(element), what);
    try { localStorage.setItem(store, JSON.stringify(Object.fromEntries(marks))); } catch { /* for this visit only */ }
    paint(element);
    tell();
  };

  const sort = () => {
    const down = order.value.startsWith("-");
    const by = order.value.replace("-", "");
    const compare = by === "key"
      ? (a, b) => (a.key < b.key ? -1 : Number(a.key > b.key))
      : (a, b) => (down ? b[by] - a[by] : a[by] - b[by]);
    const sorted = [...pairs].sort(compare);
    for (const pair of sorted) pair.card.querySelector(".pairs").append(pair.element);
    // A picture comes where the first of its pairs comes.
    list.append(...new Set(sorted.map((pair) => pair.card)));
    enter(shown()[0]);
  };
  const percent = (value) => (value > 0 && value < 0.001 ? "less than 0.1 %" : `${Number((100 * value).toPrecision(2))} %`);
  const tell = () => {
    const drops = [...marks.values()].filter((what) => what === "drop").length;
    const left = shown().length;
    count.textContent = `${left.toLocaleString("en")} of ${pairs.length.toLocaleString("en")} pairs`
      + (marks.size ? `, ${drops} to drop, ${marks.size - drops} to keep` : "");
    none.hidden = left > 0;
  };
  const sift = () => {
    const most = probabilities[Number(threshold.value) - 1];
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const pair of pairs) {
      pair.element.hidden = pair.probability > most || !words.every((word) => pair.text.includes(word));
    }
    for (const card of cards) card.hidden = !card.querySelector(".pair:not([hidden])");
    limit.textContent = percent(most);
    threshold.setAttribute("aria-valuetext", `likely by at most ${limit.textContent}`);
    const across = cut.ownerSVGElement.viewBox.baseVal.width * most;
    cut.setAttribute("x1", across);
    cut.setAttribute("x2", across);
    cut.removeAttribute("hidden");
    tell();
    enter(shown()[0]);
  };
  // One pair at a time is in the order of the Tab key, or a thousand would lie between the controls and the end.
  const enter = (element, focus = false) => {
    for (const other of list.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    if (!element) return;
    element.tabIndex = 0;
    if (focus) element.focus();
  };
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const pair = event.target.closest(".pair");
    if (event.key in steps) {
      const visible = shown();
      const to = visible.indexOf(pair) + steps[event.key];
      enter(visible[Math.min(Math.max(to, 0), visible.length - 1)], true);
      event.preventDefault();
    } else if (pair && (event.key === "d" || event.key === "k")) {
      mark(pair, event.key === "d" ? "drop" : "keep");
      event.preventDefault();
    }
  });
  list.addEventListener("click", (event) => {
    const button = event.target.closest("[data-mark]");
    if (!button) return;
    enter(button.closest(".pair"));
    mark(button.closest(".pair"), button.dataset.mark);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== filter) {
      filter.focus();
      event.preventDefault();
    } else if (event.key === "Escape" && document.activeElement === filter) {
      filter.value = "";
      sift();
    }
  });
  const elements = pairs.map((pair) => pair.element);
  const marked = (what) => elements.filter((element) => marks.get(identity(element)) === what);
  const asKey = (element) => element.dataset.key;
  // What `openclip-otco audit --marks` reads.
  const asMark = (element) => {
    const { key, shard, caption } = element.dataset;
    return JSON.stringify({ mark: marks.get(identity(element)), key, shard, caption });
  };
  const lists = {
    marks: () => ["marks.jsonl", elements.filter((element) => marks.has(identity(element))).map(asMark)],
    drop: () => ["keys-drop.txt", marked("drop").map(asKey)],
    keep: () => ["keys-keep.txt", marked("keep").map(asKey)],
    shown: () => ["keys-shown.txt", shown().map(asKey)],
  };
  save.addEventListener("click", () => {
    const [name, lines] = lists[which.value]();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines.map((line) => `${line}\n`), { type: "text/plain" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  controls.addEventListener("submit", (event) => event.preventDefault());
  order.addEventListener("change", sort);
  filter.addEventListener("input", sift);
  threshold.addEventListener("input", sift);
  controls.hidden = false;
  for (const { element } of pairs) {
    element.tabIndex = -1;
    for (const button of element.querySelectorAll("button")) button.tabIndex = -1;
    paint(element);
  }
  sift();
})();

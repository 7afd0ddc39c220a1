
(() => {
  const list = document.getElementById("cards");
  if (!list) return;
  const [controls, order, filter, threshold] = ["controls", "order", "filter", "threshold"].map((id) =>
    document.getElementById(id));
  const [limit, count, none, save] = ["limit", "count", "none", "save"].map((id) => document.getElementById(id));
  const cards = [...list.children].map((element) => ({
    element,
    key: element.dataset.key,
    confidence: Number(element.dataset.confidence),
    cosine: Number(element.dataset.cosine),
    text: element.textContent.toLowerCase(),
  }));
  // The slider moves by pairs, not by values: most confidences lie close to zero.
  const confidences = cards.map((card) => card.confidence).sort((a, b) => a - b);
  const shown = () => [...list.children].filter((element) => !element.hidden);

  const sort = () => {
    const down = order.value.startsWith("-");
    const by = order.value.replace("-", "");
    const compare = by === "key"
      ? (a, b) => (a.key < b.key ? -1 : Number(a.key > b.key))
      : (a, b) => (down ? b[by] - a[by] : a[by] - b[by]);
    list.append(...[...cards].sort(compare).map((card) => card.element));
    enter(shown()[0]);
  };
  const sift = () => {
    const most = confidences[Number(threshold.value) - 1];
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const card of cards) {
      card.element.hidden = card.confidence > most || !words.every((word) => card.text.includes(word));
      left += Number(!card.element.hidden);
    }
    limit.textContent = String(Number(most.toPrecision(4)));
    threshold.setAttribute("aria-valuetext", `confidence at most ${limit.textContent}`);
    count.textContent = `${left.toLocaleString("en")} of ${cards.length.toLocaleString("en")} pairs`;
    none.hidden = left > 0;
    enter(shown()[0]);
  };
  // One card at a time is in the order of the Tab key, or a thousand would lie between the controls and the end.
  const enter = (element, focus = false) => {
    for (const other of list.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    if (!element) return;
    element.tabIndex = 0;
    if (focus) element.focus();
  };
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

  list.addEventListener("keydown", (event) => {
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    const visible = shown();
    const to = visible.indexOf(document.activeElement) + steps[event.key];
    enter(visible[Math.min(Math.max(to, 0), visible.length - 1)], true);
    event.preventDefault();
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
  save.addEventListener("click", () => {
    const keys = shown().map((element) => `${element.dataset.key}\n`).join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([keys], { type: "text/plain" }));
    link.download = "keys.txt";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  controls.addEventListener("submit", (event) => event.preventDefault());
  order.addEventListener("change", sort);
  filter.addEventListener("input", sift);
  threshold.addEventListener("input", sift);
  controls.hidden = false;
  for (const { element } of cards) element.tabIndex = -1;
  sift();
})();


// Reads charts off: the pointer, or the arrow keys on a chart with the focus, move a cursor to the nearest step.
for (const svg of document.querySelectorAll(".chart svg")) {
  const cursor = svg.querySelector(".cursor");
  const [outputs, at] = [svg.parentElement.querySelectorAll("output"), svg.parentElement.querySelector(".at")];
  const lines = [...svg.querySelectorAll(".line")].map((path) => {
    const [places, steps] = ["places", "steps"].map((name) => path.dataset[name].split(" ").map(Number));
    return { places, steps, values: path.dataset.values.split(" ") };
  });
  const nearest = (places, x) => places.reduce((best, place, index) =>
    (Math.abs(place - x) < Math.abs(places[best] - x) ? index : best), 0);
  const show = (x) => {
    const place = lines[0].places[nearest(lines[0].places, x)];
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    lines.forEach(({ places, steps, values }, index) => {
      const here = nearest(places, place);
      const value = Number(values[here]);
      outputs[index].textContent = Number.isFinite(value) ? String(Number(value.toPrecision(4))) : values[here];
      if (index === 0) at.textContent = `${svg.dataset.across} ${steps[here].toLocaleString("en")}`;
    });
    return place;
  };
  const visible = (yes) => cursor.setAttribute("visibility", yes ? "visible" : "hidden");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    show(((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width);
    visible(true);
  });
  svg.addEventListener("pointerleave", () => visible(false));
  svg.addEventListener("blur", () => visible(false));
  svg.addEventListener("focus", () => { show(Number(svg.dataset.right)); visible(svg.matches(":focus-visible")); });
  svg.addEventListener("keydown", (event) => {
    const { places } = lines[0];
    const now = nearest(places, Number(cursor.getAttribute("x1")));
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: places.length - 1 }[event.key];
    if (to === undefined) return;
    show(places[Math.min(Math.max(to, 0), places.length - 1)]);
    visible(true);
    event.preventDefault();
  });
}

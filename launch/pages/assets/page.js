// Draw the charts of a page of results, sort its tables, and browse its generations.
// Plain script: nothing is fetched, and every text is set as text, never as HTML.
"use strict";
(() => {
  const STEP = 25; // problems that are shown at a time
  const MAX_LINES = 16; // switches of a chart that are shown without being asked for
  const [PRINT_WIDTH, PRINT_HEIGHT] = [660, 300]; // pixels, of a chart on paper
  const isTouched = window.matchMedia("(pointer: coarse)").matches;
  const CONFIG = {
    responsive: true,
    displaylogo: false,
    displayModeBar: !isTouched,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  const MARGIN = { l: 60, r: 15, t: 30, b: 50 };
  const DASHES = {
    solid: "", dash: "6 4", dashdot: "7 3 2 3", dot: "2 3", longdash: "11 4", longdashdot: "11 3 2 3", "2px,2px": "2 2",
  };
  const SYMBOLS = {
    circle: "M0-4A4 4 0 1 0 0 4A4 4 0 1 0 0-4Z", square: "M-4-4H4V4H-4Z", "triangle-up": "M0-5L5 4H-5Z",
    "triangle-down": "M0 5L5-4H-5Z", diamond: "M0-5L5 0L0 5L-5 0Z",
    cross: "M-1.5-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z",
    x: "M-4.5-2.5L-2.5-4.5L0-2L2.5-4.5L4.5-2.5L2 0L4.5 2.5L2.5 4.5L0 2L-2.5 4.5L-4.5 2.5L-2 0Z",
  };

  const readData = (id) => JSON.parse(document.getElementById(id).textContent);

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children); // a string becomes a text node
    return element;
  }

  // ---- Charts ----

  function drawChart(chart) {
    const section = document.getElementById(chart.name);
    const plot = section.querySelector(".plot");
    const select = section.querySelector(".choice");
    const figures = Object.values(chart.figures);
    const draw = () => {
      const figure = figures[select ? Number(select.value) : 0];
      const layout = {
        ...figure.layout, margin: MARGIN, showlegend: false, autosize: true,
        height: figure.layout.height ?? Math.min(420, Math.max(320, window.innerWidth * 0.6)),
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 13 },
      };
      if (isTouched) layout.dragmode = false; // a finger scrolls the page
      const traces = structuredClone(figure.traces);
      for (const line of figure.lines) for (const i of line.traces) traces[i].visible = line.shown;
      Plotly.react(plot, traces, layout, CONFIG);
      drawSwitches(section.querySelector(".switches"), plot, figure.lines);
      drawNumbers(section.querySelector(".numbers"), figure.numbers);
    };
    select?.addEventListener("change", draw);
    draw();
    return draw;
  }

  function drawSwitches(box, plot, lines) {
    const inputs = lines.map((line) => {
      const input = make("input", { type: "checkbox" });
      input.checked = line.shown;
      input.addEventListener("change", () => {
        line.shown = input.checked;
        Plotly.restyle(plot, { visible: line.shown }, line.traces);
      });
      return input;
    });
    const labels = lines.map((line, i) => make("label", {}, inputs[i], drawSample(line), line.label));
    const setAll = (checked) => {
      for (const input of inputs) input.checked = checked;
      for (const line of lines) line.shown = checked;
      Plotly.restyle(plot, { visible: checked }, lines.flatMap((line) => line.traces));
    };
    box.replaceChildren();
    let list = box;
    if (lines.length > MAX_LINES) {
      list = make("div", { class: "switches" });
      box.append(make("details", {}, make("summary", {}, `Lines (${lines.length})`), list));
    }
    list.append(...labels);
    if (lines.length > 2) {
      for (const [text, checked] of [["All", true], ["None", false]]) {
        const button = make("button", { type: "button" }, text);
        button.addEventListener("click", () => setAll(checked));
        list.append(button);
      }
    }
  }

  function drawSample(line) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    svg.setAttribute("viewBox", "0 0 42 14");
    svg.setAttribute("aria-hidden", "true");
    const draw = (tag, attributes) => {
      const element = document.createElementNS(space, tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      svg.append(element);
    };
    if (line.dash !== "none") {
      draw("path", { d: "M1 7H41", stroke: line.colour, "stroke-width": 2.4, "stroke-dasharray": DASHES[line.dash], fill: "none" });
    }
    if (line.symbol !== "none") draw("path", { d: SYMBOLS[line.symbol], fill: line.colour, transform: "translate(21 7)" });
    return svg;
  }

  function drawNumbers(details, numbers) {
    details.hidden = numbers.length === 0;
    if (details.hidden) return;
    const [titles, ...rows] = numbers;
    const head = make("tr", {}, ...titles.map((title) => make("th", { scope: "col" }, title)));
    const body = rows.map(([label, ...values]) =>
      make("tr", {}, make("th", { scope: "row" }, label), ...values.map((value) => make("td", { class: "number" }, value))));
    details.querySelector(".scroll").replaceChildren(
      make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
  }

  // ---- Tables ----

  function readCell(row, column) {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    return value === undefined ? cell.textContent.trim() : Number(value);
  }

  function compareCells(first, second) {
    const isNumber = [typeof first === "number", typeof second === "number"];
    if (isNumber[0] && isNumber[1]) return first - second;
    if (isNumber[0] !== isNumber[1]) return isNumber[0] ? -1 : 1;
    return first.localeCompare(second, undefined, { numeric: true });
  }

  function sortTable(table, column) {
    const heading = table.tHead.rows[0].cells[column];
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [readCell(row, column), row]);
    const isEmpty = (value) => value === "" || Number.isNaN(value);
    rows.sort(([first], [second]) => {
      if (isEmpty(first) || isEmpty(second)) return isEmpty(first) - isEmpty(second); // empty cells come last
      return sign * compareCells(first, second);
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  function startTables() {
    for (const table of document.querySelectorAll("table.sortable")) {
      for (const heading of table.tHead.rows[0].cells) {
        heading.querySelector("button").addEventListener("click", () => sortTable(table, heading.cellIndex));
      }
    }
  }

  // ---- Generations ----

  function startGenerations({ sources, problems }) {
    const form = document.getElementById("filters");
    const { suite, source, grade, text } = form.elements;
    const list = document.getElementById("problems");
    const more = document.getElementById("more");
    const status = document.getElementById("shown");
    for (const name of new Set(problems.map((problem) => problem.suite))) suite.append(make("option", { value: name }, name));
    sources.forEach((name, number) => source.append(make("option", { value: number }, name)));
    let found = [];
    let shown = 0;

    const find = () => {
      const sought = text.value.trim().toLowerCase();
      found = [];
      for (const problem of problems) {
        if (suite.value && problem.suite !== suite.value) continue;
        let responses = problem.responses;
        if (source.value) responses = responses.filter(([number]) => number === Number(source.value));
        responses = filterByGrade(responses, grade.value);
        if (sought && ![problem.id, problem.question, problem.reference].some((part) => part.toLowerCase().includes(sought))) {
          responses = responses.filter((response) => response[2].toLowerCase().includes(sought));
        }
        if (responses.length) found.push([problem, responses]);
      }
      list.replaceChildren();
      shown = 0;
      showMore();
    };
    const showMore = () => {
      for (const [problem, responses] of found.slice(shown, shown + STEP)) list.append(drawProblem(problem, responses, sources));
      shown = Math.min(found.length, shown + STEP);
      more.hidden = shown === found.length;
      const count = found.reduce((sum, [, responses]) => sum + responses.length, 0);
      status.textContent = found.length
        ? `Showing ${shown.toLocaleString("en")} of ${found.length.toLocaleString("en")} problems (${count.toLocaleString("en")} responses).`
        : "Nothing passes these filters.";
    };

    let waiting;
    text.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(find, 150); });
    for (const select of [suite, source, grade]) select.addEventListener("change", find);
    form.addEventListener("submit", (event) => { event.preventDefault(); find(); });
    form.addEventListener("reset", () => setTimeout(find)); // once the fields are empty
    more.addEventListener("click", showMore);
    find();
  }

  function filterByGrade(responses, grade) {
    const strict = responses.map((response) => response[3]);
    switch (grade) {
      case "right": return responses.filter((response) => response[3] === true);
      case "wrong": return responses.filter((response) => response[3] === false);
      case "ungraded": return responses.filter((response) => response[3] === null);
      case "graders": return responses.filter((response) => response[3] !== null && response[4] !== null && response[3] !== response[4]);
      case "sources": return strict.includes(true) && strict.includes(false) ? responses : [];
      default: return responses;
    }
  }

  function drawProblem(problem, responses, sources) {
    const item = make("li", {}, make("h3", {}, `${problem.suite} · ${problem.id}`));
    if (problem.question) item.append(make("p", { class: "text" }, problem.question));
    if (problem.reference) item.append(make("p", { class: "text" }, make("strong", {}, "Reference: "), problem.reference));
    for (const [source, sample, output, strict, literature, remark] of responses) {
      const name = sample ? `${sources[source]}, sample ${sample + 1}` : sources[source];
      const line = make("p", { class: "source" }, make("strong", {}, name), drawBadge(strict, ""));
      if (literature !== null && literature !== strict) line.append(drawBadge(literature, "literature: "));
      if (remark) line.append(make("span", {}, remark));
      const state = { true: "right", false: "wrong" }[strict] ?? "";
      item.append(make("div", { class: `response ${state}` }, line, make("p", { class: "text" }, output || "(empty)")));
    }
    return item;
  }

  function drawBadge(passed, prefix) {
    if (passed === null) return make("span", { class: "badge" }, "not graded yet");
    return make("span", { class: `badge ${passed ? "right" : "wrong"}` }, prefix + (passed ? "✓ right" : "✗ wrong"));
  }

  // ---- Start ----

  const charts = readData("charts-data");
  const plots = () => document.querySelectorAll(".plot.js-plotly-plot");
  const redraws = charts.map(drawChart);
  startTables();
  const generations = readData("generations-data");
  if (generations) startGenerations(generations);
  window.addEventListener("beforeprint", () => {
    for (const plot of plots()) {
      const height = Math.min(PRINT_HEIGHT, plot.layout.height);
      Plotly.relayout(plot, { autosize: false, width: PRINT_WIDTH, height, "font.size": 11 });
    }
  });
  window.addEventListener("afterprint", () => {
    for (const draw of redraws) draw();
  });
})();

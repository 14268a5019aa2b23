// @ts-check
// Tables whose every header sorts, and the downloads.

const CHUNK = 100; // rows of a tall table put in at once: all of a thousand would make each sort wait for their layout
const order = new Intl.Collator("en", { numeric: true }); // h.2 before h.10

/**
 * @param {{ columns: any[], rows: any[], caption: string, name?: string, onRow?: Function, tall?: boolean }} options
 * columns [{key, label, group, value(row) -> number | text | null, format, cell(row, value) -> node, title}]; those without any value
 * are left out. A tall table scrolls in its own box, and gets its rows as they are scrolled to. Returns
 * {box, table, columns, row(one), shown(), rows(list), flush(), forget()}.
 */
function dataTable({ columns, rows, caption, name, onRow, tall = false }) {
  columns = columns.filter((column) => rows.some((row) => known(column.value(row))));
  for (const column of columns)
    column.numeric = rows.every((row) => !known(column.value(row)) || typeof column.value(row) === "number");
  const body = html("tbody");
  const made = new Map();
  let current = rows;
  let shown = rows;
  let sorting = { column: null, down: false };
  let next = 0; // the first row that is not in the table yet

  const build = (row) => {
    if (!made.has(row))
      made.set(
        row,
        html(
          "tr",
          onRow ? { class: "opens" } : {},
          columns.map((column, i) => cellOf(column, row, i === 0)),
        ),
      );
    return made.get(row);
  };
  const put = (count) => {
    body.append(...shown.slice(next, next + count).map(build));
    next += count;
  };
  const draw = () => {
    shown = current;
    const { column, down } = sorting;
    if (column) {
      const compare = column.numeric ? (a, b) => a - b : (a, b) => order.compare(String(a), String(b));
      shown = [...current].sort((one, other) => {
        const [a, b] = [column.value(one), column.value(other)];
        // what is unknown comes last, either way
        if (!known(a) || !known(b)) return Number(known(b)) - Number(known(a));
        return down ? compare(b, a) : compare(a, b);
      });
    }
    body.replaceChildren();
    next = 0;
    put(tall ? CHUNK : shown.length);
    box.scrollTop = 0;
  };
  const heads = columns.map((column) => {
    const turn = () => {
      const same = sorting.column === column;
      sorting = same && sorting.down ? { column: null, down: false } : { column, down: same };
      for (const [i, head] of heads.entries()) {
        if (columns[i] === sorting.column) head.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      }
      draw();
    };
    const spoken = column.group ? `${column.group} ${column.label}` : column.label;
    return html(
      "th",
      { scope: "col", "data-key": column.key, class: column.numeric && !column.drawn ? "n" : null },
      html(
        "button",
        { type: "button", title: column.title, "aria-label": `${spoken}, sort`, on: { click: turn } },
        column.label,
      ),
    );
  });
  if (onRow)
    body.addEventListener("click", (event) => {
      const tr = event.target.closest("tr.opens");
      if (!tr || String(window.getSelection())) return; // selecting text to copy is no click
      for (const [row, node] of made) if (node === tr) onRow(row, node);
    });
  const head = html("thead", {}, groupsOf(columns), html("tr", {}, heads));
  const box = html("div", {
    class: tall ? "scroll tall" : "scroll",
    tabindex: "0",
    role: "region",
    "aria-label": caption,
  });
  const table = html("table", { id: name }, html("caption", {}, caption), head, body);
  box.append(table);
  if (tall)
    box.addEventListener("scroll", () => {
      if (next < shown.length && box.scrollTop + 2 * box.clientHeight > box.scrollHeight) put(CHUNK);
    });
  draw();
  return {
    box,
    table,
    columns,
    row: build,
    flush: () => put(shown.length),
    shown: () => shown,
    rows(list) {
      current = list;
      draw();
    },
    forget() {
      made.clear();
      draw();
    },
  };
}

function groupsOf(columns) {
  if (!columns.some((column) => column.group)) return null;
  const cells = [];
  for (let i = 0; i < columns.length;) {
    let end = i + 1;
    while (end < columns.length && columns[i].group && columns[end].group === columns[i].group) end += 1;
    cells.push(
      columns[i].group
        ? html("th", { colspan: end - i, scope: "colgroup", class: "group" }, html("span", {}, columns[i].group))
        : html("td"),
    );
    i = end;
  }
  return html("tr", { class: "groups" }, cells);
}

function cellOf(column, row, first) {
  const value = column.value(row);
  const number = typeof value === "number";
  const content = column.cell
    ? column.cell(row, value)
    : known(value)
      ? number
        ? (column.format || show.number)(value)
        : String(value)
      : "";
  return html(
    first ? "th" : "td",
    {
      scope: first ? "row" : null,
      class: number || column.numeric ? "n" : null,
      "data-key": column.key,
      "data-value": known(value) && !column.drawn ? value : null,
    },
    content,
  );
}

/** A plain list of facts: [[term, node or text], ...], empty ones left out. */
function facts(pairs) {
  const there = pairs.filter(([, value]) => known(value) && value !== "");
  return there.length
    ? html(
        "dl",
        { class: "facts" },
        there.map(([term, value]) => html("div", {}, html("dt", {}, term), html("dd", {}, value))),
      )
    : null;
}

// ---- columns that Python lists ------------------------------------------------------------------------------------

const FORMS = { count: show.whole, size: show.count, share: show.share, times: show.times, number: show.number };

/** Values that are reckoned or put into words, by the key of their column. */
const DERIVED = {
  kept: (row) =>
    known(row.parameters_after) && row.parameters_before ? row.parameters_after / row.parameters_before : null,
  shape: (row) => row.shape.join(" \u00d7 ") || null,
  input: (row) => row.input.join(" \u00d7 ") || null,
  names: (row) => row.names.join(" "),
  status: (row) => (row.reason ? `${row.status}: ${row.reason}` : row.status),
  reached: (row) => (row.reached ? "reached" : "not reached"),
  slower: (row) => (row.slower ? "slower" : "not slower"),
};

/** A value within an object by the path of its keys, such as before.stable; null where there is none. */
const dig = (row, path) => path.split(".").reduce((at, key) => (known(at) ? at[key] : null), row) ?? null;
const valueOf = (row, key) => (key in DERIVED ? DERIVED[key](row) : dig(row, key));
const columnOf = (key) => view.columns.find((column) => column.key === key);

/** Columns of a table; `cells` draw some by their keys, `through` turns a row into the one that is shown. */
const columnsOf = (listed, cells = {}, through = (row) => row) =>
  listed.map(({ key, label, group, form, hint }) => ({
    key,
    group,
    label: group ? label : capital(label),
    title: hint,
    format: FORMS[form],
    cell: cells[key],
    value: (row) => valueOf(through(row), key),
  }));

// ---- downloads ----------------------------------------------------------------------------------------------------

function csvOf(columns, rows) {
  const field = (value) => {
    if (!known(value)) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value; // a spreadsheet would run it as a formula
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const plain = columns.filter((column) => !column.drawn);
  const lines = [
    plain.map((column) => column.key),
    ...rows.map((row) => plain.map((column) => field(column.value(row)))),
  ];
  return lines.map((line) => line.join(",")).join("\r\n") + "\r\n";
}

function save(text, type, name) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = html("a", { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

const fileName = (ending) => `${String(report.name || "report").replace(/[^\w.-]+/g, "_")}.${ending}`;

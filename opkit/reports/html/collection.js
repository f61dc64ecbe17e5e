// The tips of curves, from the tables of numbers: both say the same, and the page says it once.
// A mark's own label, where it has one, is what no column holds.
for (const figure of document.querySelectorAll("figure[data-numbers]")) {
  const table = document.getElementById(figure.dataset.numbers);
  const words = JSON.parse(table.dataset.words);
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const [rows, ratio, beside] = [table.tBodies[0].rows, heads.indexOf("×"), heads.indexOf("shipped ms")];
  figure.querySelectorAll(".mark").forEach((mark, at) => {
    const cells = [...rows[at].cells].map((cell) => cell.textContent.trim());
    const of = (head) => cells[heads.indexOf(head)];
    const known = (place) => place >= 0 && cells[place] !== "–";
    const flags = of("flags").split(" ").filter(Boolean).join(", ");
    mark.setAttribute("aria-label", [
      `${words.map((word, n) => `${word} ${cells[n]}`.trim()).join(" · ")}: ${of("latency ms")} ms` +
        (of("±") === "–" ? "" : `, ±${of("±")}`),
      `${of("n")} ${rows[at].dataset.source ?? table.dataset.source} times, ${of("least")} to ${of("most")} ms`,
      known(ratio) && `${cells[ratio]} × the least possible ${of("roofline ms")} ms`,
      known(beside) && `${cells[beside + 1]} × the shipped ${cells[beside]} ms`,
      flags,
      mark.getAttribute("aria-label"),
    ].filter(Boolean).join("\n"));
  });
}

"use strict";
// The tab of the marks: what people said a part really was.

async function showMarks() {
  const box = $("marks");
  const card = make("section", "card");
  card.append(make("h2", "", "What people said a part really was"));
  try {
    const marks = await (await fetch("api/marks")).json();
    const list = make("dl");
    card.append(list);
    facts(list, [
      ["Marked good", String(marks.good)],
      ["Marked bad", String(marks.bad)],
      ["Kept at most", String(marks.at_most)],
      ["Where", marks.folder],
    ]);
    card.append(make("p", "soft", "Mark parts under Inspect: click a part, then say what it was. Marks are never deleted; take the pictures away for the next training."));
  } catch {
    card.append(make("p", "", "The daemon does not answer."));
  }
  box.replaceChildren(card);
}

// The facts on each answer (its speed, for example), behind a button of its own.
(() => {
  const { forMessages, button, make, set } = window.minigpt4;
  let answers = {};

  const described = ({ line, figures }) => {
    const list = figures.map(([name, value]) => make("div", {},
      make("dt", { textContent: name }), make("dd", { textContent: value })));
    const all = make("details", {}, make("summary", { textContent: line }), make("dl", {}, ...list));
    return make("span", { className: "facts", hidden: true }, all);
  };
  const add = (buttons, known) => {
    const before = buttons.querySelector(".about");
    if (before?.known === known) return;
    before?.remove();
    buttons.querySelector(".facts")?.remove();
    if (!known) return;
    const note = described(known);
    const about = button("about", "about", () => {
      note.hidden = !note.hidden;
      set(about, { ariaExpanded: !note.hidden });
      note.scrollIntoView({ block: "nearest" });
    });
    about.classList.add("about", "small");
    set(about, { known, ariaExpanded: "false" });
    buttons.append(about, note);
  };
  const update = forMessages((buttons, place, row) => {
    add(buttons, answers[place]);
    window.minigpt4.speakable(buttons, row);
  });
  const facts = (told) => {
    answers = told?.answers ?? {};
    window.minigpt4.sending(false);
    window.minigpt4.where.update(told?.objects);
    update();
  };
  Object.assign(window.minigpt4, { facts });
})();

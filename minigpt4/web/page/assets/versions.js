// ‹ 1/2 › below a message that has further versions: see versions.py.
(() => {
  const { say, forMessages, button, make } = window.minigpt4;
  let known = {}, select = () => {};

  const add = (buttons, version) => {
    const before = buttons.querySelector(".version");
    if (before?.known === version) return;
    before?.remove();
    if (!version) return;
    const { place, number, count } = version;
    const text = say("version_of").replace("{number}", number + 1).replace("{count}", count);
    const turn = (key, icon, step) => {
      const made = button(key, icon, () => {
        window.minigpt4.endEditing();
        select({ index: 0, value: { place, number: number + step } });
      });
      made.disabled = !(number + step >= 0 && number + step < count);
      return made;
    };
    buttons.append(make("span", { className: "version", role: "group", known: version, ariaLabel: text },
      turn("previous_version", "left", -1), make("span", { textContent: `${number + 1}/${count}` }),
      turn("next_version", "right", 1)));
  };
  const update = forMessages((buttons, place) => add(buttons, known[place]));
  const versions = (told, event) => {
    [known, select] = [told?.versions ?? {}, event];
    update();
  };
  Object.assign(window.minigpt4, { versions });
})();

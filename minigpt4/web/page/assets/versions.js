// ‹ 1/2 › below a message that has further versions: see versions.py.
(() => {
  const { say, forMessages, button, make } = window.minigpt4;
  let known = {}, select = () => {};
  let turned = null; // the version that the keyboard has just left, and the step from it
  document.addEventListener("keydown", () => { turned = null; }, true);

  const add = (buttons, version) => {
    const before = buttons.querySelector(".version");
    if (before?.known === version) return;
    before?.remove();
    if (!version) return;
    const { place, number, count } = version;
    const text = say("version_of").replace("{number}", number + 1).replace("{count}", count);
    const turn = (key, icon, step) => {
      const made = button(key, icon, ({ detail }) => {
        window.minigpt4.endEditing();
        turned = detail ? null : { version, step };
        select({ index: 0, value: { place, number: number + step } });
      });
      made.disabled = !(number + step >= 0 && number + step < count);
      return made;
    };
    buttons.append(make("span", { className: "version", role: "group", known: version, ariaLabel: text },
      turn("previous_version", "left", -1), make("span", { textContent: `${number + 1}/${count}` }),
      turn("next_version", "right", 1)));
    if (turned?.version.place !== place || turned.version === version) return;
    // The keyboard stays there, although the buttons are new ones.
    const [back, on] = buttons.querySelectorAll(".version button");
    const [same, other] = turned.step < 0 ? [back, on] : [on, back];
    (same.disabled ? other : same).focus();
    turned = null;
  };
  const update = forMessages((buttons, place) => add(buttons, known[place]));
  const versions = (told, event) => {
    [known, select] = [told?.versions ?? {}, event];
    update();
  };
  Object.assign(window.minigpt4, { versions });
})();

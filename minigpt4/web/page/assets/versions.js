// ‹ 1/2 › below what has further versions: see versions.py.
(() => {
  const { say, button } = window.minigpt4;
  let known = {}, select = () => {};

  const add = (row, version) => {
    const buttons = row.nextElementSibling?.matches(".message-buttons") && row.nextElementSibling;
    const before = buttons && buttons.querySelector(".version");
    if (!buttons || before?.known === version) return;
    before?.remove();
    if (!version) return;
    const { place, number, count } = version;
    const text = say("version_of").replace("{number}", number + 1).replace("{count}", count);
    const group = document.createElement("span");
    const turn = (key, icon, step) => {
      const made = button(key, icon, () => select({ index: 0, value: { place, number: number + step } }));
      made.disabled = !(number + step >= 0 && number + step < count);
      return made;
    };
    const words = document.createElement("span");
    words.textContent = `${number + 1}/${count}`;
    Object.assign(group, { className: "version", known: version, ariaLabel: text });
    group.setAttribute("role", "group");
    group.append(turn("previous_version", "left", -1), words, turn("next_version", "right", 1));
    buttons.append(group);
  };
  const update = () => {
    document.querySelectorAll("#chat .message-row").forEach((row, place) => add(row, known[place]));
  };
  const versions = (told, event) => {
    [known, select] = [told?.versions ?? {}, event];
    update();
  };
  window.minigpt4.whenRedrawn(update);
  Object.assign(window.minigpt4, { versions });
})();

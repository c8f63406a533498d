// What is in the message box and has not been sent survives a reload of this tab.
(() => {
  const KEY = "minigpt4:draft";
  const write = (box) => {
    try {
      if (box?.text || box?.files?.length) sessionStorage.setItem(KEY, JSON.stringify(box));
      else sessionStorage.removeItem(KEY);
    } catch { /* there is no room */ }
  };
  const keep = (box) => {
    write(box);
    if (!box?.text) setTimeout(window.minigpt4.emptied);
    return box;
  };
  const load = () => {
    try { return JSON.parse(sessionStorage.getItem(KEY)) ?? { __type__: "update" }; }
    catch { return { __type__: "update" }; }
  };
  // Gradio does not tell what is typed while a picture is on its way.
  document.addEventListener("input", ({ target }) => {
    if (target.matches("#box textarea")) write({ files: [], ...load(), text: target.value, __type__: undefined });
  });
  Object.assign(window.minigpt4, { draft: { keep, load } });
})();

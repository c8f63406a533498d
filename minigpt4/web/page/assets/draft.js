// What is in the message box and has not been sent survives a reload of this tab.
(() => {
  const KEY = "minigpt4:draft";
  const keep = (box) => {
    try {
      if (box?.text || box?.files?.length) sessionStorage.setItem(KEY, JSON.stringify(box));
      else sessionStorage.removeItem(KEY);
    } catch { /* there is no room */ }
    if (!box?.text) setTimeout(window.minigpt4.emptied);
    return box;
  };
  const load = () => {
    try { return JSON.parse(sessionStorage.getItem(KEY)) ?? { __type__: "update" }; }
    catch { return { __type__: "update" }; }
  };
  Object.assign(window.minigpt4, { draft: { keep, load } });
})();

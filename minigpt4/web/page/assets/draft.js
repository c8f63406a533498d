// The draft: what is in the message box survives a reload of this tab, until it is stored elsewhere.
(() => {
  const KEY = "minigpt4:draft";
  const SENT = "minigpt4:sent"; // the question that was accepted, until its conversation is stored
  const read = (key) => {
    try { return JSON.parse(sessionStorage.getItem(key)); } catch { return null; }
  };
  const write = (box, key = KEY) => {
    try {
      if (box?.text || box?.files?.length) sessionStorage.setItem(key, JSON.stringify(box));
      else sessionStorage.removeItem(key);
    } catch { /* there is no room */ }
  };
  const words = (text) => text.replace(/\s/g, "");
  let sent = null; // the draft that was sent and is still in the box
  const send = (now) => { sent = now ? read(KEY) : null; };
  const keep = (box) => {
    write(box);
    if (!box?.text) setTimeout(window.minigpt4.emptied);
    return box;
  };
  // The box has changed. If it was emptied after sending, what was added meanwhile is put back.
  const changed = (box) => {
    const files = read(KEY)?.files ?? [];
    keep(box);
    setTimeout(window.minigpt4.undone);
    const before = sent;
    if (!before || box?.text || box?.files?.length) return { __type__: "update" };
    sent = null;
    write(before, SENT);
    const later = files.filter(({ path }) => !before.files?.some((file) => file.path === path));
    if (!later.length) return { __type__: "update" };
    return { text: window.minigpt4.surplus(), files: later };
  };
  // A conversation with this text has been stored.
  const kept = (text) => {
    if (words(text).includes(words(read(SENT)?.text ?? ""))) write(null, SENT);
  };
  const load = () => {
    const [before, now] = [read(SENT), read(KEY)];
    write(null, SENT);
    if (!before || (before.text && now?.text?.startsWith(before.text))) return now ?? { __type__: "update" };
    const text = [before.text, now?.text].filter(Boolean).join("\n");
    return { text, files: [...before.files ?? [], ...now?.files ?? []] };
  };
  // Gradio does not report what is typed while a picture is being uploaded.
  document.addEventListener("input", ({ target }) => {
    if (target.matches("#box textarea")) write({ files: [], ...read(KEY), text: target.value });
  });
  Object.assign(window.minigpt4, { draft: { keep, changed, kept, load, send } });
})();

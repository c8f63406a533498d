// The visitor's conversations: how they are kept, found, opened and deleted; each has an address.
(() => {
  const { say, make, store, notice } = window.minigpt4;
  const OLD = "minigpt4:chat:"; // keys in localStorage, where conversations used to be
  const SIDE = 96, UNDO = 10_000; // a thumbnail's side in pixels; how long Undo is offered, in ms
  const channel = window.BroadcastChannel ? new BroadcastChannel("minigpt4") : null;
  const random = () => Array.from(crypto.getRandomValues(new Uint8Array(8)),
    (byte) => byte.toString(16).padStart(2, "0")).join("");

  // --- the list ---------------------------------------------------------------------------------
  let list = new Map(); // id -> its entry in the list
  const draw = () => dispatchEvent(new Event("minigpt4:chats"));
  const changed = () => {
    draw();
    channel?.postMessage("changed");
  };
  const load = async () => {
    const all = await (await store).all("chats");
    list = new Map(all.map((chat) => [chat.id, chat]));
    draw();
  };
  channel?.addEventListener("message", load);
  const all = () => [...list.values()].filter((chat) => !chat.deleted)
    .sort((a, b) => Boolean(b.pinned) - Boolean(a.pinned) || b.time - a.time);
  // A conversation and its further versions (see versions.py), one after another.
  const tailsOf = (tail) => [tail, ...Object.values(tail.forks ?? {})
    .flatMap(({ tails }) => tails.filter(Boolean).flatMap(tailsOf))];
  const partsOf = (talk) => tailsOf(talk).flatMap(({ messages }) => messages).flatMap(({ parts }) => parts);
  const textOf = (talk) => partsOf(talk).map((part) => part.text ?? "").join("\n");
  // Conversations with all of these words in their title or text, and the place of the first.
  const search = async (words) => {
    const wanted = words.trim().toLowerCase().split(/\s+/);
    const texts = new Map((await (await store).all("talks")).map((talk) => [talk.id, textOf(talk)]));
    return all().flatMap((chat) => {
      const text = (texts.get(chat.id) ?? "").replace(/\s+/g, " ");
      const [low, title] = [text.toLowerCase(), (chat.title ?? "").toLowerCase()];
      if (!wanted.every((word) => low.includes(word) || title.includes(word))) return [];
      const at = Math.min(...wanted.map((word) => low.indexOf(word)).filter((place) => place >= 0));
      if (at === Infinity) return [{ ...chat }];
      return [{ ...chat, found: (at > 20 ? "…" : "") + text.slice(Math.max(0, at - 20), at + 80) }];
    });
  };

  // --- writing ----------------------------------------------------------------------------------
  // Conversations are written one after another; if there is no room, the oldest are deleted.
  let last = Promise.resolve();
  const inTurn = (act) => (last = last.then(act, act));
  const withRoom = async (act) => {
    for (;;) {
      try { return await act(); }
      catch (error) {
        const oldest = all().filter(({ pinned }) => !pinned).slice(1).pop();
        if (error?.name !== "QuotaExceededError" || !oldest) {
          notice(say("no_room"));
          return undefined;
        }
        list.delete(oldest.id);
        await (await store).remove([oldest.id]);
        await (await store).sweep();
      }
    }
  };
  const change = async (ids, act) => {
    const entries = await withRoom(async () => (await store).change(ids, act)) ?? [];
    for (const { chat } of entries) list.set(chat.id, chat);
    return entries;
  };
  const edit = (ids, values) => inTurn(async () => {
    await change(ids, (chat) => chat && { chat: { ...chat, ...values } });
    changed();
  });
  const small = async (blob) => {
    const whole = await createImageBitmap(blob);
    const side = Math.min(whole.width, whole.height);
    const canvas = make("canvas", { width: SIDE, height: SIDE });
    canvas.getContext("2d").drawImage(whole, (whole.width - side) / 2, (whole.height - side) / 2,
      side, side, 0, 0, SIDE, SIDE);
    return canvas.toDataURL("image/jpeg", 0.8);
  };
  // Store a picture, unless it is stored or being fetched already; `fetched` fetches its file.
  const coming = new Map(); // key -> a promise
  const keepPicture = (key, name, fetched) => {
    const write = async () => {
      const base = await store;
      if (await base.get("pictures", key)) return;
      const blob = await fetched();
      await withRoom(() => base.put("pictures", { key, name, blob }));
    };
    if (!coming.has(key)) {
      coming.set(key, write().catch(() => coming.delete(key))); // the next record tries again
    }
    return coming.get(key);
  };
  const thumbnail = async (id, keys) => {
    const picture = keys.length && !list.get(id)?.thumb && await (await store).get("pictures", keys[0]);
    if (!picture?.blob) return;
    const thumb = await small(picture.blob).catch(() => "");
    if (thumb) await change([id], (chat) => chat && { chat: { ...chat, thumb } });
    changed();
  };

  // A conversation's name on the server -> its id here, and the time at which this page last wrote or
  // opened it. If two pages continue one conversation, the second to write it uses another id.
  const places = new Map();
  const removed = new Set(); // what this page deleted
  const fileOf = ({ path }) => async () => {
    const url = `${window.gradio_config.root}/gradio_api/file=${path.split("/").map(encodeURIComponent).join("/")}`;
    const response = await fetch(url);
    if (!response.ok) throw new Error(response.statusText);
    return response.blob();
  };
  const seen = new Set(); // the marks of records that may be told again
  const keep = async ({ name, about, data, pictures, once }) => {
    if (once && seen.has(once)) return;
    seen.add(once);
    if (about) places.set(name, { id: name });
    const { format, version, title, ...said } = data;
    const keys = [...new Set(partsOf(data).filter(({ type }) => type === "image").map(({ key }) => key))];
    const before = JSON.stringify(all().map(({ id, title }) => [id, title]));
    const write = (id, mine) => change([id], (chat, talk) => {
      // A conversation from a file does not replace the stored one if their texts differ.
      const differs = about ? talk && textOf(talk) !== textOf(said)
        : chat && !chat.deleted && mine && chat.time !== mine.time;
      if (differs) return undefined;
      const entry = { pinned: about?.pinned, named: about?.named, ...chat };
      const more = said.messages.length > (talk?.messages.length ?? 0); // it grew after another page deleted it
      if (about || (more && !removed.has(id))) delete entry.deleted;
      entry.title = chat?.named ? chat.title : (about?.title || title);
      const time = about ? chat?.time || about.time || Date.now()
        : Math.max(Date.now(), (chat?.time ?? 0) + 1);
      return { chat: { ...entry, id, time }, talk: { ...said, id, keys, files: pictures } };
    });
    let place = places.get(name) ?? { id: name };
    let [now] = await write(place.id, place);
    if (!now) {
      place = { id: random() };
      [now] = await write(place.id, null);
    }
    if (now) {
      places.set(name, { id: place.id, time: now.chat.time });
      window.minigpt4.draft.kept(textOf(said));
    }
    if (JSON.stringify(all().map(({ id, title }) => [id, title])) !== before) changed();
    const { id } = place;
    Promise.all(Object.entries(pictures).map(([key, file]) => keepPicture(key, file.name, fileOf(file))))
      .then(() => list.get(id)?.thumb || inTurn(() => thumbnail(id, keys)));
  };

  // A stored picture. A page that was left right after sending has not fetched it: the server may
  // still have it.
  const readPicture = async ({ files }, key) => {
    if (files?.[key]) await keepPicture(key, files[key].name, fileOf(files[key]));
    return (await store).get("pictures", key);
  };

  // --- deleting ---------------------------------------------------------------------------------
  const sweep = async (age) => {
    const gone = [...list.values()].filter(({ deleted }) => deleted && Date.now() - deleted > age);
    if (!gone.length) return;
    gone.forEach(({ id }) => list.delete(id));
    await (await store).remove(gone.map(({ id }) => id));
    await (await store).sweep();
    coming.clear();
  };
  // Conversations leave the list at once, and the store when Undo is no longer offered. While its
  // notice is shown, Undo also brings back those deleted before.
  let undo = null, gone = [], left; // the notice; what Undo brings back; which of these was shown
  const remove = async (ids) => {
    if (!undo?.isConnected) [gone, left] = [[], null];
    const all = gone = [...new Set([...gone, ...ids])];
    const shown = ids.includes(current);
    if (shown) left = current;
    const before = left;
    all.forEach((id) => removed.add(id));
    const text = all.length === 1 ? say("deleted") : say("deleted_many").replace("{count}", all.length);
    undo = notice(text, say("undo_delete"), async () => {
      all.forEach((id) => removed.delete(id));
      await edit(all, { deleted: undefined });
      const sent = document.documentElement.hasAttribute("data-sending");
      const idle = current === null && (opening === null || !sent); // New chat may be on its way
      if (before && idle) open(before); // else another one is shown by now
    }, UNDO);
    await edit(all, { deleted: Date.now() });
    if (shown) {
      address(null);
      want(null);
    }
    setTimeout(() => inTurn(() => sweep(UNDO)), UNDO + 1000);
  };

  // --- the conversation that is shown, and its address ---------------------------------------------
  let current = null; // its id
  let select = null; // the list's event, which opens a conversation
  // `opening`: the conversation that is being opened, null for a new one; `wanted`: the one to open next.
  let opening, wanted;
  let empty = false; // is "New chat" clicked by this script, for an address without a conversation?
  const addressed = () => {
    try { return decodeURIComponent(location.hash.match(/^#\/c\/([^/]+)$/)?.[1] ?? "") || null; }
    catch { return null; } // a damaged address
  };
  const address = (id, replace) => {
    if (id === addressed()) return;
    const url = id ? `#/c/${encodeURIComponent(id)}` : location.pathname + location.search;
    history[replace ? "replaceState" : "pushState"](null, "", url);
  };
  const set = (id) => {
    if (current === id) return;
    current = id;
    window.minigpt4.endEditing();
    window.minigpt4.silence();
    draw();
  };
  const upload = async (files) => {
    if (!files.length) return [];
    const form = new FormData();
    files.forEach((file) => form.append("files", file));
    const response = await fetch(`${window.gradio_config.root}/gradio_api/upload`, { method: "POST", body: form, quiet: true });
    if (!response.ok) throw new Error(await response.text());
    return response.json();
  };
  const show = async (id) => {
    const before = current;
    [opening, wanted] = [id, undefined];
    document.documentElement.toggleAttribute("data-opening", true);
    set(id);
    if (!id) {
      empty = true;
      document.querySelector("#new-chat").click();
      empty = false;
      return;
    }
    const base = await store;
    const [chat, talk] = [await base.get("chats", id), await base.get("talks", id)];
    if (chat) places.set(id, { id, time: chat.time }); // first: a late record may change it meanwhile
    try {
      const found = (await Promise.all(talk.keys.map((key) => readPicture(talk, key)))).filter(Boolean);
      const files = found.map(({ blob, name, key }) => new File([blob], name || `${key.slice(0, 8)}.jpg`));
      const paths = await upload(files);
      const pictures = Object.fromEntries(found.map(({ key }, place) => [key, paths[place]]));
      for (const part of partsOf(talk)) { // a lost picture becomes "…"
        if (part.type === "image" && !(part.key in pictures)) Object.assign(part, { type: "text", text: "…" });
      }
      const data = { ...talk, format: "minigpt4-conversation", version: 1, pictures };
      select({ index: 0, value: { about: { id }, data } });
    } catch {
      window.minigpt4.keepUnsent();
      if (before) address(before, true); // none after a reload: the address stays for another try
      settle(before || "");
      notice(say("error_connection"));
    }
  };
  const settle = (id) => {
    const next = wanted;
    window.minigpt4.forget(); // a question sent before belongs to the conversation that was left
    [opening, wanted] = [undefined, undefined];
    if (next !== undefined && next !== id) {
      show(next);
      return;
    }
    document.documentElement.toggleAttribute("data-opening", false);
    set(id);
  };
  const target = () => (wanted === undefined ? current : wanted);
  const want = (id) => {
    // A question that waits for uploads belongs to the shown conversation: it is not sent in another.
    // After a reload, the shown one is the one that is being opened.
    if (document.documentElement.dataset.opening !== "first") window.minigpt4.keepUnsent();
    document.querySelectorAll("dialog[open]").forEach((dialog) => dialog.close());
    if (opening === undefined) show(id);
    else wanted = id;
  };
  // Show a stored conversation, or say that it is not stored here.
  const open = async (id, replace) => {
    await begun;
    const chat = await (await store).get("chats", id);
    if (!chat || chat.deleted) {
      notice(say("not_here"));
      address(current, true);
      document.documentElement.toggleAttribute("data-opening", opening !== undefined);
      return;
    }
    address(id, replace);
    want(id);
  };
  // Handle a message from transcript.py: conversations to store, and which one the page shows.
  const told = (news) => {
    if (!news) return;
    if (news.forgotten) {
      notice(say("forgotten"));
      window.minigpt4.putBack(news.text);
      open(news.forgotten, true);
      return;
    }
    for (const record of news.records) inTurn(() => keep(record));
    inTurn(() => {
      const id = news.shown ? places.get(news.shown)?.id ?? news.shown : null;
      const opened = news.settled && opening === id; // the address may be another one by now
      if (news.settled) settle(id);
      if (opening !== undefined) return;
      if (!opened) address(id, !news.settled);
      set(id);
    });
  };
  // The entry of the conversation that is shown, for its download.
  const about = () => {
    const { id, title, time, named, pinned } = list.get(current) ?? {};
    return { id, title, time, named, pinned };
  };

  document.addEventListener("click", (event) => {
    if (!event.target.closest("#new-chat")) return;
    if (!empty) address(null);
    if (opening === undefined) [opening, wanted] = [null, undefined];
    else if (opening !== null) { // after the one that is being opened
      event.stopPropagation();
      wanted = null;
    }
    set(null);
  }, true);
  addEventListener("popstate", () => {
    const id = addressed();
    if (id === target()) return;
    if (id) open(id, true);
    else want(null);
  });

  // --- the start -----------------------------------------------------------------------------------
  const takeOver = async () => {
    let kept = [];
    try { kept = Object.keys(localStorage); } catch { /* the browser keeps nothing */ }
    for (const key of kept.filter((key) => key.startsWith(OLD))) {
      try {
        const { title, named, time, data } = JSON.parse(localStorage.getItem(key));
        const id = key.slice(OLD.length), keys = Object.keys(data.pictures);
        for (const [picture, url] of Object.entries(data.pictures)) {
          await keepPicture(picture, "", async () => (await fetch(url)).blob());
        }
        const { model, system, messages } = data;
        await change([id], (chat) => chat ? undefined
          : { chat: { id, title, named, time }, talk: { id, model, system, messages, keys } });
        await thumbnail(id, keys);
      } catch { /* it is damaged */ }
      localStorage.removeItem(key);
    }
  };
  const begun = (async () => {
    await load();
    await inTurn(takeOver);
    await inTurn(() => sweep(6 * UNDO)); // another page may still undo what was deleted there
    draw();
  })();
  // Once the list and the server's session are loaded, open the conversation in the address.
  let loaded;
  const session = new Promise((resolve) => { loaded = resolve; });
  const start = async (event) => {
    select = event;
    const id = addressed();
    if (!id) return;
    await session;
    open(id, true);
  };
  if (addressed()) document.documentElement.dataset.opening = "first";
  Object.assign(window.minigpt4, {
    chats: {
      all, search, edit, remove, told, about, open, start, loaded, target, get current() { return current; },
      get opening() { return opening !== undefined; }, // also for New chat
    },
  });
})();

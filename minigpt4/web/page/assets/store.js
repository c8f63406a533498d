// The store of conversations: this browser's IndexedDB, or memory if there is none.
//
// chats: what the list shows of each conversation; talks: what was said in it, and the keys of its
// pictures; pictures: their files, each kept once, however many conversations show it.
(() => {
  const TALK = ["chats", "talks"]; // the parts with entries of one conversation
  const done = (request) => new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  const open = () => {
    const opening = indexedDB.open("minigpt4", 1);
    opening.onupgradeneeded = () => {
      const base = opening.result;
      base.createObjectStore("chats", { keyPath: "id" });
      base.createObjectStore("talks", { keyPath: "id" }).createIndex("keys", "keys", { multiEntry: true });
      base.createObjectStore("pictures", { keyPath: "key" });
    };
    return done(opening);
  };

  class Base {
    constructor(base) {
      this.base = base;
      base.onversionchange = () => base.close();
    }
    part(name) { return this.base.transaction(name).objectStore(name); }
    all(name) { return done(this.part(name).getAll()); }
    get(name, key) { return done(this.part(name).get(key)); }
    // Call `act` with these parts, in one transaction. Resolves once all has been written.
    write(names, act) {
      return new Promise((resolve, reject) => {
        const writing = this.base.transaction(names, "readwrite");
        act(...names.map((name) => writing.objectStore(name)));
        writing.oncomplete = () => resolve();
        writing.onabort = () => reject(writing.error);
      });
    }
    put(name, entry) { return this.write([name], (part) => part.put(entry)); }
    // Change conversations in one transaction: `act` gets each one's entries, or undefined, and
    // returns the new ones, or nothing if none is to change. Returns the new ones.
    async change(ids, act) {
      const changed = [];
      await this.write(TALK, (chats, talks) => ids.forEach((id) => {
        chats.get(id).onsuccess = ({ target: { result: chat } }) => {
          talks.get(id).onsuccess = ({ target: { result: talk } }) => {
            const now = act(chat, talk);
            if (now?.chat) chats.put(now.chat);
            if (now?.talk) talks.put(now.talk);
            if (now) changed.push(now);
          };
        };
      }));
      return changed;
    }
    remove(ids) {
      return this.write(TALK, (...parts) => parts.forEach((part) => ids.forEach((id) => part.delete(id))));
    }
    // Delete the pictures that no conversation shows any more.
    sweep() {
      return this.write(["talks", "pictures"], (talks, pictures) => {
        pictures.getAllKeys().onsuccess = ({ target: { result: keys } }) => {
          for (const key of keys) talks.index("keys").count(key).onsuccess = ({ target: { result: count } }) => {
            if (!count) pictures.delete(key);
          };
        };
      });
    }
  }

  class Memory {
    parts = { chats: new Map(), talks: new Map(), pictures: new Map() };
    async all(name) { return [...this.parts[name].values()]; }
    async get(name, key) { return this.parts[name].get(key); }
    async put(name, entry) { this.parts[name].set(entry.id ?? entry.key, entry); }
    async change(ids, act) {
      const { chats, talks } = this.parts;
      const changed = ids.map((id) => act(chats.get(id), talks.get(id))).filter(Boolean);
      for (const { chat, talk } of changed) {
        if (chat) chats.set(chat.id, chat);
        if (talk) talks.set(talk.id, talk);
      }
      return changed;
    }
    async remove(ids) {
      for (const id of ids) for (const name of TALK) this.parts[name].delete(id);
    }
    async sweep() {
      const shown = new Set([...this.parts.talks.values()].flatMap((talk) => talk.keys));
      for (const key of this.parts.pictures.keys()) if (!shown.has(key)) this.parts.pictures.delete(key);
    }
  }

  // Private windows of some browsers have no IndexedDB, or one that cannot be written.
  const store = (async () => {
    let base;
    try {
      base = new Base(await open());
      await base.put("pictures", { key: "" });
      return base;
    } catch (error) {
      if (base && error?.name === "QuotaExceededError") return base; // full: it can still be read
      document.documentElement.toggleAttribute("data-forgets", true);
      return new Memory();
    }
  })();
  Object.assign(window.minigpt4, { store });
})();

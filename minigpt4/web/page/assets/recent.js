// The list of conversations, which chats.js keeps. Everything is inserted as text, never as markup;
// the server gets a conversation only when it is opened.
const list = element.querySelector(".list");
const field = element.querySelector("[type=search]");
const none = element.querySelector(".none");
const nothing = element.querySelector(".nothing");
const all = element.querySelector(".all");
const { say, make, button, chats } = minigpt4;

const makeRow = (chat, today) => {
  const title = chat.title || say("untitled");
  const picture = make(chat.thumb ? "img" : "span");
  if (/^data:image\/jpeg;base64,/.test(chat.thumb)) { picture.src = chat.thumb; picture.alt = ""; }
  else {
    picture.className = "blank";
    picture.dataset.icon = "chat";
  }
  const open = make("button", { type: "button", className: "title", textContent: title });
  if (chat.id === chats.current) open.setAttribute("aria-current", "page");
  const asked = new Date(chat.time);
  const short = asked.toLocaleString([], today ? { timeStyle: "short" } : { dateStyle: "medium" });
  open.append(make("time", { textContent: chat.found ?? short, title: asked.toLocaleString() }));
  open.addEventListener("click", () => {
    if (chat.id !== chats.target()) chats.open(chat.id);
    minigpt4.drawer("");
  });
  const pin = button(chat.pinned ? "unpin" : "pin", "pin", () => {
    chats.edit([chat.id], { pinned: !chat.pinned });
  }, title);
  pin.classList.toggle("pinned", Boolean(chat.pinned));
  const rename = button("rename", "rename", () => {
    const input = make("input", { value: title, ariaLabel: say("rename") });
    let done = false;
    const finish = (keep, byKey) => {
      if (done) return;
      done = true;
      input.replaceWith(open);
      if (byKey) open.focus();
      const name = input.value.trim();
      if (keep && name && name !== title) chats.edit([chat.id], { title: name, named: true });
      else draw();
    };
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (!["Enter", "Escape"].includes(event.key) || event.isComposing) return;
      event.preventDefault(); // the element that is focused next must not get the key, too
      finish(event.key === "Enter", true);
    });
    input.addEventListener("blur", () => finish(true));
    input.addEventListener("mousedown", (event) => {
      if (event.detail > 1) event.preventDefault(); // of a double click on the button that was here
    }, { once: true });
    open.replaceWith(input);
    input.focus();
    input.select();
  }, title);
  const discard = button("delete", "delete", () => chats.remove([chat.id]), title);
  const item = make("li", {}, picture, open, rename, discard, pin);
  item.dataset.id = chat.id;
  return item;
};
// A row stays the same element until something that it shows has changed.
let drawn = new Map(), before; // id -> [the row, what it shows], of this drawing and the one before
const row = (chat) => {
  const today = new Date(chat.time).toDateString() === new Date().toDateString();
  const { title, thumb, time, pinned, found } = chat;
  const shown = [title, thumb, time, pinned, found, today, chat.id === chats.current];
  const [kept, last] = before.get(chat.id) ?? [];
  const same = kept && shown.every((value, place) => value === last[place]);
  drawn.set(chat.id, [same ? kept : makeRow(chat, today), shown]);
  return drawn.get(chat.id)[0];
};
// Make these the element's children, and move only what is elsewhere.
const arrange = (parent, children) => {
  const wanted = new Set(children);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  children.forEach((child, place) => {
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
  });
};

// The list is not redrawn while a pointer is pressed on it: the click would miss its row or hit
// another one.
let pressed = false, late = false, releasing;
const release = () => {
  pressed = false;
  if (late) draw();
};
list.addEventListener("pointerdown", () => {
  clearTimeout(releasing);
  pressed = true;
});
// The second click of a double click would hit another row that has moved there, or undo the first.
list.addEventListener("click", (event) => {
  if (event.detail > 1 && event.target.closest("button:not(.title)")) event.stopPropagation();
}, true);
list.addEventListener("click", release); // after the row's own button
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => {
  clearTimeout(releasing);
  releasing = setTimeout(release, 300); // a finger's click may come a moment later, or never
});

// Pinned ones first, then those of today, of the last seven days, and the others.
const headed = Object.fromEntries(["pinned", "today", "week", "earlier"].map((name) => [
  name, [make("h2", { textContent: say(name) }), make("ul", { className: "recent" })],
]));
const groups = (found) => {
  [before, drawn] = [drawn, new Map()];
  const today = new Date().setHours(0, 0, 0, 0);
  const age = (time) => (time >= today ? "today" : time >= today - 7 * 864e5 ? "week" : "earlier");
  const sorted = { pinned: [], today: [], week: [], earlier: [] };
  for (const chat of found) sorted[chat.pinned ? "pinned" : age(chat.time)].push(chat);
  return Object.entries(sorted).filter(([, some]) => some.length).flatMap(([name, some]) => {
    arrange(headed[name][1], some.map(row));
    return headed[name];
  });
};
const show = (found) => {
  if (list.querySelector("input")) return; // a name is being edited; its end redraws the list
  late = pressed;
  if (late) return;
  // The focus stays on the same button of the same chat's row. If the row is gone, the next one gets
  // it; without a next one, the search in a drawer, or else the element that layout.js focuses.
  const focused = list.contains(document.activeElement) && document.activeElement;
  const within = focused && focused.closest("li");
  const place = within ? [...within.children].indexOf(focused) : -1;
  const rows = () => [...list.querySelectorAll("li")];
  const number = rows().indexOf(within);
  arrange(list, groups(found));
  if (place >= 0) {
    const same = rows().find(({ dataset }) => dataset.id === within.dataset.id);
    const next = same ?? rows()[Math.min(number, rows().length - 1)];
    if (next) next.children[place].focus();
    else if (document.getElementById("main").inert) field.focus();
  }
  const searched = Boolean(field.value.trim());
  none.hidden = searched || found.length > 0;
  nothing.hidden = !searched || found.length > 0;
  all.hidden = searched || found.length < 2;
};
const draw = async () => {
  const words = field.value;
  const found = words.trim() ? await chats.search(words) : chats.all();
  if (words === field.value) show(found);
};

let typing;
field.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(draw, 150);
});
all.addEventListener("click", () => {
  if (confirm(say("delete_all_sure"))) chats.remove(chats.all().map(({ id }) => id));
});
addEventListener("minigpt4:chats", draw);
draw();
chats.start((chosen) => trigger("select", chosen));

// The list of recent conversations, which page.js stores. Everything is inserted as text, never as
// markup; the server gets a conversation only when it is opened.
const list = element.querySelector(".recent");
const none = element.querySelector(".none");
const all = element.querySelector(".all");
const { say, recent: { load, find, store, remove, opening } } = minigpt4;
const icons = {
  rename: "M4 20h4L19 9l-4-4L4 16zM13.5 6.5l4 4",
  delete: "M5 7h14M10 4h4M7 7l1 13h8l1-13M10 11v5M14 11v5",
};

const button = (label, icon, act) => {
  const made = document.createElement("button");
  made.type = "button";
  made.title = label;
  made.setAttribute("aria-label", label);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, value] of Object.entries({
    viewBox: "0 0 24 24", fill: "none", stroke: "currentColor", "stroke-width": 1.8, "aria-hidden": true,
  })) svg.setAttribute(name, value);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", icons[icon]);
  svg.append(path);
  made.append(svg);
  made.addEventListener("click", act);
  return made;
};

const row = (entry) => {
  const title = entry.title || say("untitled");
  const item = document.createElement("li");
  const first = Object.values(entry.data.pictures ?? {})[0];
  const picture = document.createElement(first ? "img" : "span");
  if (first && /^data:image\/jpeg;base64,/.test(first)) { picture.src = first; picture.alt = ""; }
  else picture.className = "blank";
  const open = document.createElement("button");
  open.type = "button";
  open.className = "title";
  open.textContent = title;
  const time = document.createElement("time");
  time.textContent = new Date(entry.time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  open.append(time);
  open.addEventListener("click", () => {
    trigger("select", { index: 0, value: opening(entry) });
    minigpt4.drawer("");
  });
  const rename = button(`${say("rename")}: ${title}`, "rename", () => {
    const input = document.createElement("input");
    input.value = title;
    input.setAttribute("aria-label", say("rename"));
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      input.replaceWith(open);
      // The conversation may have been continued or deleted while its name was edited.
      const { key, ...rest } = find(entry.key) ?? {};
      const name = input.value.trim();
      if (keep && key && name) store(key, { ...rest, title: name, named: true });
      else draw();
    };
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") finish(false);
    });
    input.addEventListener("blur", () => finish(true));
    open.replaceWith(input);
    input.focus();
    input.select();
  });
  const discard = button(`${say("delete")}: ${title}`, "delete", () => {
    remove(entry.key);
  });
  item.append(picture, open, rename, discard);
  return item;
};

// While the list is pressed, its rows stay where they are: if they were redrawn, the click would
// miss its row or hit another one.
let pressed = false, late = false, releasing;
const release = () => {
  pressed = false;
  if (late) draw();
};
list.addEventListener("pointerdown", () => {
  clearTimeout(releasing);
  pressed = true;
});
list.addEventListener("click", release); // after the row's own button
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => {
  clearTimeout(releasing);
  releasing = setTimeout(release, 300); // a finger's click may come a moment later, or never
});

const draw = () => {
  if (list.querySelector("input")) return; // a name is being edited; that draws when it ends
  late = pressed;
  if (late) return;
  const entries = load();
  list.replaceChildren(...entries.map(row));
  none.hidden = entries.length > 0;
  all.hidden = entries.length < 2;
};

all.addEventListener("click", () => {
  if (confirm(say("delete_all_sure"))) for (const { key } of load()) remove(key);
});
addEventListener("minigpt4:recent", draw);
addEventListener("storage", draw);
draw();

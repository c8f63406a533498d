// The first script in a website's frame. No policy covers WebRTC, which could tell another host
// something: it is taken away. A frame within this one would have it anew, and so is removed as soon
// as it is there, before it has loaded.
{
  delete window.RTCPeerConnection;
  delete window.webkitRTCPeerConnection;
  // Taken hold of now: the website's own script may change what stands under these names.
  const first = document.querySelector.bind(document, "iframe, frame");
  const remove = Function.prototype.call.bind(Element.prototype.remove);
  new MutationObserver(() => {
    for (let frame; (frame = first()); ) remove(frame);
  }).observe(document, { childList: true, subtree: true });

  // In a shadow root no frame would be found: neither calls make one nor, see preview.py, markup.
  delete Element.prototype.attachShadow;
  for (const maker of [Element.prototype, Document, Document.prototype]) {
    for (const name of Object.getOwnPropertyNames(maker)) {
      if (name.endsWith("Unsafe")) delete maker[name];
    }
  }
  Document.prototype.write = Document.prototype.writeln = (...html) => {
    document.currentScript?.insertAdjacentHTML("beforebegin", html.join(""));
  };
}

// Gradio's client has one stream of events, which the server ends when nothing is left to do. What
// joins the queue just then is lost: the client still believes that its stream is open, opens none,
// and closes that one. So it is told that it has joined only once the stream is closed, or after a
// moment in which that would have happened.
(() => {
  const MOMENT = 150; // milliseconds
  let closed = null; // resolves when the open stream is closed
  const plain = window.fetch.bind(window);
  window.fetch = async (resource, options) => {
    const address = String(resource?.url ?? resource);
    const signal = resource?.signal ?? options?.signal;
    if (signal && /\/gradio_api\/queue\/data(\?|$)/.test(address)) {
      const closing = new Promise((resolve) => {
        signal.addEventListener("abort", () => {
          if (closed === closing) closed = null;
          resolve();
        });
      });
      closed = closing;
    }
    const response = await plain(resource, options);
    if (closed && /\/gradio_api\/queue\/join(\?|$)/.test(address)) {
      await Promise.race([closed, new Promise((resolve) => { setTimeout(resolve, MOMENT); })]);
    }
    return response;
  };
})();

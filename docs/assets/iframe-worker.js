// A page that was opened from a file may not start a worker, so the search would not work there. On such a page the
// worker's script runs in a hidden frame instead: the same messages go in and come out.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.document.open()
      inside.document.write("<!doctype html><html><body></body></html>")
      inside.document.close()
      inside.postMessage = data => setTimeout(() => this.receive(data))
      this.inside = inside
      this.waiting = []
      const script = inside.document.createElement("script")
      script.src = new URL(url, location.href).href
      script.onload = () => {
        const waiting = this.waiting
        this.waiting = null
        for (const data of waiting) this.deliver(data)
      }
      inside.document.body.append(script)
    }
    receive(data) {
      const message = new MessageEvent("message", { data })
      if (this.onmessage) this.onmessage(message)
      this.dispatchEvent(message)
    }
    deliver(data) {
      this.inside.dispatchEvent(new MessageEvent("message", { data }))
    }
    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.deliver(data)
    }
    terminate() {
      this.frame.remove()
    }
  }

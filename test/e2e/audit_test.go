package e2e

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/acproxy/acproxy/fetch"
)

// audited returns what the audit says about an image, by event.
func (s *scene) audited(im image) map[string]fetch.Decision {
	s.t.Helper()
	data := must(os.ReadFile(s.path("data", "audit.log")))(s.t)
	out := make(map[string]fetch.Decision)
	for line := range strings.Lines(string(data)) {
		var d fetch.Decision
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			s.t.Fatalf("the audit holds %q: %v", line, err)
		}
		if d.Ref.Name() == im.name {
			out[d.Event] = d
		}
	}
	return out
}

// metrics returns the server's metrics.
func (s *scene) metrics() string {
	s.t.Helper()
	status, body := s.admin("/metrics")
	if status != http.StatusOK {
		s.t.Fatalf("the admin socket answers %d for the metrics: %s", status, body)
	}
	return body
}

// admin asks the server on its admin socket.
func (s *scene) admin(path string) (status int, body string) {
	s.t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", s.path("data", "admin.sock"))
		},
	}}
	req := must(http.NewRequestWithContext(s.context(), http.MethodGet, "http://acproxy"+path, nil))(s.t)
	resp := must(client.Do(req))(s.t)
	defer resp.Body.Close()
	return resp.StatusCode, string(must(io.ReadAll(resp.Body))(s.t))
}

// TestProfilesAreForTheUserOfTheServer wants profiles on the admin socket, which is there for the user that the server runs as, and on no listener.
func TestProfilesAreForTheUserOfTheServer(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/goroutine", "/debug/pprof/profile?seconds=1", "/debug/pprof/trace?seconds=0.1"} {
		if status, body := s.admin(path); status != http.StatusOK || body == "" {
			t.Errorf("the admin socket answers %d for %s, with %d bytes", status, path, len(body))
		}
		wantProblem(t, s.get(s.plain()+path), http.StatusNotFound, "no-such-page")
	}
}

func TestDecisionsAreToldToOperators(t *testing.T) {
	t.Parallel()
	s := newScene(t, "")
	good := s.publish(app("good"))
	bad := s.publishAs(app("bad"), stranger(t))
	s.hold(good)
	s.inspected(good)
	wantProblem(t, s.get(s.direct(bad, "aci")), http.StatusForbidden, "unknown-key")

	eventually(t, "the end of the inspection is audited", func() bool { return s.audited(good)[fetch.EventInspected].Event != "" })
	accepted, inspected, refused := s.audited(good)[fetch.EventAccepted], s.audited(good)[fetch.EventInspected], s.audited(bad)[fetch.EventRefused]
	if accepted.Outcome != "accepted" || len(accepted.Signers) != 1 || accepted.Signers[0] != s.key.Fingerprint() || accepted.Digest.IsZero() ||
		accepted.Client != "127.0.0.1" || !strings.Contains(accepted.Policy, "signature=required") || accepted.Source == "" || accepted.Time.IsZero() {
		t.Errorf("of an accepted image the audit says %+v", accepted)
	}
	if inspected.ImageID != good.id {
		t.Errorf("after the inspection the audit says %+v, want the image ID %v", inspected, good.id)
	}
	if refused.Outcome != "unknown-key" || refused.Detail == "" || refused.Client != "127.0.0.1" {
		t.Errorf("of a refused image the audit says %+v", refused)
	}

	if code, out := s.cli("trust", "rm", "--prefix", imageHost, s.key.Fingerprint()); code != 0 {
		t.Fatalf("trust rm = %d\n%s", code, out)
	}
	// The command has told the server: there is nothing to wait for.
	wantProblem(t, s.get(s.direct(good, "aci")), http.StatusForbidden, "unknown-key")
	if _, out := s.cli("images"); !strings.Contains(out, "quarantined: ") {
		t.Errorf("acproxy images doesn't say that the image is quarantined:\n%s", out)
	}
	eventually(t, "the quarantine is audited", func() bool { return s.audited(good)[fetch.EventQuarantined].Outcome == "unknown-key" })

	file := s.write("key.asc", s.key.Armored())
	if code, out := s.cli("trust", "add", "--prefix", imageHost, "--fingerprint", s.key.Fingerprint(), file); code != 0 {
		t.Fatalf("trust add = %d\n%s", code, out)
	}
	wantImage(t, s.get(s.direct(good, "aci")), good)
	eventually(t, "the return is audited", func() bool { return s.audited(good)[fetch.EventRestored].Outcome == "accepted" })

	// The gauge is set when all images have been judged, after the last of them was told of.
	eventually(t, "no image is distrusted", func() bool { return strings.Contains(s.metrics(), "acproxy_images_distrusted 0\n") })
	said := s.metrics()
	for _, want := range []string{
		`acproxy_decisions_total{event="accepted",outcome="accepted"} 1`,
		`acproxy_decisions_total{event="quarantined",outcome="unknown-key"} 1`,
		`acproxy_decisions_total{event="restored",outcome="accepted"} 1`,
	} {
		if !strings.Contains(said, want+"\n") {
			t.Errorf("the metrics don't say %s", want)
		}
	}
}

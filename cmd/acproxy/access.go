package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"strconv"
	"time"

	"github.com/acproxy/acproxy/internal/config"
	"github.com/acproxy/acproxy/internal/server"
)

// newAccess returns what writes the lines of requests, in the form of the log's other lines. Package slog would take half as long for one as answering it
// takes, because it can write anything. It writes none while the log's level leaves out such lines.
func newAccess(cfg config.Log, log *slog.Logger, w *logWriter, atOnce bool) func(server.Access) {
	line := textLine
	if cfg.Format == config.LogJSON {
		line = jsonLine
	}
	return func(a server.Access) {
		if log.Enabled(context.Background(), slog.LevelInfo) {
			w.lineOf(a, line, atOnce)
		}
	}
}

// textLine appends the line of a request as slog.TextHandler writes it.
func textLine(b []byte, a server.Access, now time.Time) []byte {
	b = now.AppendFormat(append(b, "time="...), "2006-01-02T15:04:05.000Z07:00")
	b = append(b, " level=INFO msg=request"...)
	b = textField(b, " id=", a.ID)
	if a.Trace != "" {
		b = textField(b, " trace_id=", a.Trace)
	}
	b = textField(b, " client=", a.Client)
	if a.User != "" {
		b = textField(b, " user=", a.User)
	}
	b = textField(b, " method=", a.Method)
	b = textField(b, " host=", a.Host)
	b = textField(b, " path=", a.Path)
	b = textField(b, " proto=", a.Proto)
	b = strconv.AppendInt(append(b, " status="...), int64(a.Status), 10)
	b = strconv.AppendInt(append(b, " bytes="...), a.Bytes, 10)
	b = append(append(b, " took="...), a.Took.String()...)
	b = textField(b, " cache=", a.Cache)
	if a.Ref != "" {
		b = textField(b, " ref=", a.Ref)
	}
	if a.Err != nil {
		b = textField(b, " err=", a.Err.Error())
	}
	return append(b, '\n')
}

func textField(b []byte, key, value string) []byte {
	b = append(b, key...)
	if value == "" {
		return append(b, `""`...)
	}
	plain := true
	for i := range len(value) {
		switch c := value[i]; {
		case c < ' ', c > '~', c == '"', c == '\\':
			return strconv.AppendQuote(b, value)
		case c == ' ', c == '=':
			plain = false
		}
	}
	if plain {
		return append(b, value...)
	}
	return append(append(append(b, '"'), value...), '"')
}

// jsonLine appends the line of a request as slog.JSONHandler writes it.
func jsonLine(b []byte, a server.Access, now time.Time) []byte {
	b = now.AppendFormat(append(b, `{"time":"`...), time.RFC3339Nano)
	b = append(b, `","level":"INFO","msg":"request"`...)
	b = jsonField(b, `,"id":`, a.ID)
	if a.Trace != "" {
		b = jsonField(b, `,"trace_id":`, a.Trace)
	}
	b = jsonField(b, `,"client":`, a.Client)
	if a.User != "" {
		b = jsonField(b, `,"user":`, a.User)
	}
	b = jsonField(b, `,"method":`, a.Method)
	b = jsonField(b, `,"host":`, a.Host)
	b = jsonField(b, `,"path":`, a.Path)
	b = jsonField(b, `,"proto":`, a.Proto)
	b = strconv.AppendInt(append(b, `,"status":`...), int64(a.Status), 10)
	b = strconv.AppendInt(append(b, `,"bytes":`...), a.Bytes, 10)
	b = strconv.AppendInt(append(b, `,"took":`...), int64(a.Took), 10)
	b = jsonField(b, `,"cache":`, a.Cache)
	if a.Ref != "" {
		b = jsonField(b, `,"ref":`, a.Ref)
	}
	if a.Err != nil {
		b = jsonField(b, `,"err":`, a.Err.Error())
	}
	return append(b, "}\n"...)
}

func jsonField(b []byte, key, value string) []byte {
	b = append(b, key...)
	for i := range len(value) {
		if c := value[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			// Text is never an error to encode.
			quoted, _ := json.Marshal(value)
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), value...), '"')
}

// Registers a server in a group, with Go's own library only, by the JSON gateway of etcd.
//
//	go run register.go ETCD GROUP ID IP PORT [TTL]
//
// It publishes the load of this machine, registers again when its lease is lost, drains at SIGUSR1, and leaves at
// SIGTERM and Ctrl-C. With etcd's own client, clientv3, the steps are Grant, Put with WithLease, KeepAliveOnce, Revoke.
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// An entry, as the guide describes it.
type entry struct {
	ID       string             `json:"id"`
	IP       string             `json:"ip"`
	Port     int                `json:"port"`
	LastSeen int64              `json:"last_seen"`
	State    string             `json:"state"`
	Leaving  bool               `json:"leaving,omitempty"`
	Metadata map[string]float64 `json:"metadata"`
}

var (
	etcd   string
	client http.Client
)

// One call of etcd. Numbers of 64 bits are texts in its JSON.
func call(path string, body any, answer any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	response, err := client.Post(etcd+"/v3/"+path, "application/json", bytes.NewReader(text))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, response.Status)
	}
	// A stream answers an object for each message; only the first one is of interest.
	return json.NewDecoder(response.Body).Decode(answer)
}

func grant(ttl int) (lease string, err error) {
	var answer struct{ ID string }
	err = call("lease/grant", map[string]any{"TTL": ttl}, &answer)
	return answer.ID, err
}

// Whether the lease is still there.
func keepAlive(lease string) (bool, error) {
	var answer struct {
		Result *struct{ TTL string }
	}
	if err := call("lease/keepalive", map[string]any{"ID": lease}, &answer); err != nil {
		return false, err
	}
	if answer.Result == nil {
		return false, fmt.Errorf("lease/keepalive: no result")
	}
	left, _ := strconv.Atoi(answer.Result.TTL)
	return left > 0, nil
}

// Always with the lease: an entry without one stays for ever.
func publish(group, lease string, node entry) error {
	node.LastSeen = time.Now().UnixMilli()
	node.Metadata = map[string]float64{"queue_depth": load()}
	value, err := json.Marshal(node)
	if err != nil {
		return err
	}
	key := base64.StdEncoding.EncodeToString([]byte("registry/" + group + "/" + node.ID))
	var answer struct{}
	return call("kv/put", map[string]any{
		"key":   key,
		"value": base64.StdEncoding.EncodeToString(value),
		"lease": lease,
	}, &answer)
}

// How many processes want to run, over the last minute.
func load() float64 {
	var average float64
	text, _ := os.ReadFile("/proc/loadavg")
	fmt.Sscan(string(text), &average)
	return average
}

func main() {
	if len(os.Args) < 6 {
		log.Fatal("register ETCD GROUP ID IP PORT [TTL]")
	}
	group := os.Args[2]
	port, err := strconv.Atoi(os.Args[5])
	if err != nil {
		log.Fatal("PORT: ", err)
	}
	ttl := 10
	if len(os.Args) > 6 {
		if ttl, err = strconv.Atoi(os.Args[6]); err != nil {
			log.Fatal("TTL: ", err)
		}
	}
	etcd = os.Args[1]
	client.Timeout = time.Duration(ttl) * time.Second / 3
	node := entry{ID: os.Args[3], IP: os.Args[4], Port: port, State: "serving"}

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGTERM, syscall.SIGINT)
	lease, published := "", time.Time{}
	for {
		err := func() (err error) {
			if lease == "" {
				if lease, err = grant(ttl); err != nil {
					return err
				}
				published = time.Time{}
			}
			lives, err := keepAlive(lease)
			if err != nil {
				return err
			}
			if !lives {
				// It is gone, with the entry: another one, at once.
				lease = ""
				return nil
			}
			if time.Since(published) < 5*time.Second {
				return nil
			}
			if err = publish(group, lease, node); err == nil {
				published = time.Now()
			}
			return err
		}()
		if err != nil {
			// etcd is away: what is registered stays for as long as the lease.
			log.Print(err)
		}
		wait := min(time.Second, client.Timeout)
		if lease == "" && err == nil {
			wait = 0
		}
		select {
		case received := <-signals:
			node.State = "draining"
			published = time.Time{}
			if received == syscall.SIGUSR1 {
				continue
			}
			if lease != "" {
				node.Leaving = true
				_ = publish(group, lease, node)
				_ = call("lease/revoke", map[string]any{"ID": lease}, &struct{}{})
			}
			return
		case <-time.After(wait):
		}
	}
}

func min(a, b time.Duration) time.Duration {
	if a < b {
		return a
	}
	return b
}
